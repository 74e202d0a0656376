"""Facts of the process that a run's final report holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a program's own peak")
def test_the_peak_of_memory_is_not_that_of_the_program_that_started_it() -> None:
    held = bytearray(b"\1") * (3 << 29)  # 1.5 GiB
    code = "import json\nfrom generative_recommenders.run.summary import peak_memory\nprint(json.dumps(peak_memory()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < json.loads(done.stdout)["peak_rss_mb"] < len(held) >> 20
