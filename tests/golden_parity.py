"""Reading golden files and comparing a module with one: parameters in, outputs and gradients out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
RENAMED = (("conv1.", "linear1."), ("conv2.", "linear2."))  # 1x1 convolutions there, linear layers here
DERIVED = ("scaling", "_weight")  # buffers there that follow from sizes


@dataclass
class GoldenFile:
    config: dict
    gradient_of: str | None
    parameters: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def read_golden(case: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The arrays of ``case``.npz by their names in the file, and its ``meta``."""
    with np.load(FOLDER / f"{case}.npz", allow_pickle=False) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        return arrays, json.loads(str(archive["meta"]))


def load_golden(case: str) -> GoldenFile:
    """``case``.npz from the folder of golden files; parameter names translated to this package's."""
    arrays, meta = read_golden(case)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {_renamed(k[len(prefix) + 1 :]): v for k, v in arrays.items() if k.startswith(prefix + "/")}

    parameters = {k: v for k, v in part("param").items() if k.rpartition(".")[2] not in DERIVED}
    return GoldenFile(meta["config"], meta["gradient_of"], parameters, part("input"), part("output"), part("grad"))


def load_parameters(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy every value into the parameter of its name; both sides must have the same names."""
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(values)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name].reshape(parameter.shape))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal shapes, and no element further away than tolerance * max(1, |expected|)."""
    assert actual.shape == expected.shape
    error = (actual.detach() - expected).abs() / expected.abs().clamp(min=1.0)
    assert error.numel() == 0 or error.max().item() <= tolerance


def assert_gradients(golden: GoldenFile, output: torch.Tensor, **tensors: torch.Tensor | nn.Module) -> None:
    """Backpropagate sum(output * cotangent); compare each gradient of the file.

    tensors: ``module`` is the module whose parameters the file names; the others are inputs by name.
    """
    (output * golden.inputs["cotangent"]).sum().backward()
    leaves = {k.replace("__", "/"): v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    module = tensors.get("module")
    if isinstance(module, nn.Module):
        leaves.update(module.named_parameters())
    assert golden.gradients
    for name, expected in golden.gradients.items():
        gradient = leaves[name].grad
        assert gradient is not None, name
        assert_near(gradient.reshape(expected.shape), expected, 1e-4)


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name
