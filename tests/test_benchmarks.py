"""The step benchmark runs, and says what it is read for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "train_step.py"


def test_train_step_prints_json() -> None:
    command = [
        sys.executable,
        PROGRAM,
        "--encoder=SASRec",
        "--steps=1",
        "--num_negatives=4",
        "--plain_steps=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    positive = ("step_seconds", "tokens_per_second", "data_seconds", "peak_rss_mb", "plain_step_seconds")
    assert all(result[name] > 0 for name in positive)
    assert result["encoder"] == "SASRec"
