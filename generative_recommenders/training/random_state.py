"""The state of every global random generator of this process, as tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..features import UserError

_NUMPY, _TORCH, _CUDA = "random.numpy", "random.torch", "random.cuda"


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON values of the generators of python, numpy, torch and the current GPU."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {_NUMPY: torch.from_numpy(np.asarray(key).astype(np.int64)), _TORCH: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_CUDA] = torch.cuda.get_rng_state()
    numpy_state = [str(kind), int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore_random_state(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Sets the generators to what `random_state` returned. Raises UserError where the values are not such
    a state.

    On a machine without a GPU a GPU's state is passed over, and the other way round.
    """
    try:
        version, words, gauss = state["python"]
        kind, position, has_gauss, cached = state["numpy"]
        random.setstate((version, tuple(words), gauss))
        key = tensors[_NUMPY].numpy().astype(np.uint32)
        np.random.set_state((kind, key, position, has_gauss, cached))
        torch.set_rng_state(tensors[_TORCH])
        if _CUDA in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors[_CUDA])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's random generators cannot be restored: {error}") from error
