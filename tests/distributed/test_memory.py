"""Settings of the C library's allocator: freed memory is reused without asking the system."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
import torch
from generative_recommenders.distributed.memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
new_pages()
print(new_pages())
"""


def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 3 times 80 MB are 58,600 pages
