"""Settings of the C library's allocator: freed memory is reused without asking the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
from pathlib import Path
import torch
from generative_recommenders.commands.predict import predict
from generative_recommenders.commands.setup import Options
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.errors import UserError

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def twice():
    new_pages()
    print(new_pages())

"""
NO_RUN = """
try:
    predict(Options((), (), Path("none"), run_dir="none"), "all", "all", 5, True, None, Path("recs.csv"))
except UserError:
    twice()
"""
ENTRIES = {
    "itself": "assert keep_freed_memory()\ntwice()",
    "predict": NO_RUN,
}
"""What keeps it, called as a program does; the commands end at the run that there is not."""


@pytest.mark.parametrize("entry", ENTRIES)
def test_freed_memory_is_kept(entry: str) -> None:
    command = [sys.executable, "-c", PROGRAM + ENTRIES[entry]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 3 times 80 MB are 58,600 pages
