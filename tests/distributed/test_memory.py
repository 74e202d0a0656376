"""Settings of the C library's allocator: freed memory is reused without asking the system."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from generative_recommenders.commands.predict import predict
from generative_recommenders.commands.setup import Options
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.errors import UserError
from programs import quick_start


def predict_without_a_run() -> None:
    with contextlib.suppress(UserError):
        predict(Options((), (), Path("none"), run_dir="none"), "all", "all", 5, True, None, Path("recs.csv"))


def new_pages() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count_pages(entry: Callable[[], None], result: str) -> None:
    entry()
    new_pages()
    Path(result).write_text(str(new_pages()))


@pytest.mark.parametrize("entry", [keep_freed_memory, predict_without_a_run])
def test_freed_memory_is_kept(entry: Callable[[], None], tmp_path: Path) -> None:
    """By the function, and by a command that calls it, which ends at the run that there is not."""
    process = quick_start().Process(target=count_pages, args=(entry, str(tmp_path / "pages")))
    process.start()
    process.join()
    assert int((tmp_path / "pages").read_text()) < 1000  # 3 times 80 MB are 58,600 pages
