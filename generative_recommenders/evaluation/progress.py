"""Ranks of an evaluation under way, kept in a file of the run's folder so that a stopped one resumes where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import perf_counter

import safetensors
import safetensors.torch
import torch
from absl import logging

from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError

_RANKS = "ranks"


class EvaluationProgress:
    """The ranks found so far of one evaluation, read and written by the main process.

    path: of the file. key: what the ranks depend on; ranks of another key are not taken. minutes: from one save to the
    next; several processes save when they are stopped, and only then.
    """

    def __init__(self, path: Path, key: Callable[[], str], collectives: Collectives, minutes: float) -> None:
        self.path, self.key, self.collectives, self.minutes = path, cache(key), collectives, minutes
        self._saved_at = perf_counter()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        alone = self.collectives.world_size == 1
        return alone and perf_counter() - self._saved_at >= 60 * self.minutes

    def load(self, num_users: int) -> torch.Tensor:
        """``[U]`` int64 on all processes, 0 for users that were not ranked."""
        ranks = torch.zeros(num_users, dtype=torch.int64)
        if self.collectives.is_main and self.path.exists():
            saved = self._read()
            if saved is not None and saved.shape == ranks.shape:
                ranks = saved.long()
                logging.info("evaluation resumed: %d users already ranked", int((ranks > 0).sum()))
        return self.collectives.broadcast_(ranks)

    def _read(self) -> torch.Tensor | None:
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                same = (file.metadata() or {}).get("key") == self.key()
                return file.get_tensor(_RANKS) if same else None
        except (OSError, safetensors.SafetensorError):
            logging.warning("%s cannot be read: the evaluation starts from its beginning", self.path)
            return None

    def save(self, ranks: torch.Tensor) -> None:
        """ranks: as `load` gives them. A write failure is logged as a warning."""
        self._saved_at = perf_counter()
        if not self.collectives.is_main:
            return
        try:
            with new_file(self.path) as scratch:
                safetensors.torch.save_file({_RANKS: ranks.int()}, scratch, {"key": self.key()})
        except (UserError, safetensors.SafetensorError) as error:
            logging.warning("a stopped evaluation will start over, its ranks cannot be saved: %s", error)

    def finish(self) -> None:
        """Removes the file: nothing is left to resume."""
        if self.collectives.is_main:
            with suppress(OSError):  # it may be a folder that may only be read
                self.path.unlink(missing_ok=True)


def fingerprint(tensors: Mapping[str, torch.Tensor], facts: Iterable[str]) -> str:
    """SHA-256 of tensors by name and of text."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
