"""Start-up times by turns: ``import torch``, ``main.py --help``, and from the start of main.py to the end of its first
step.

    python benchmarks/startup.py --rounds=5

The last line is JSON: medians of wall-clock and CPU seconds, and ratios to ``import torch``. The embedded data are
prepared first; a plug-in ends the run after its first step. On a machine that does other work the CPU seconds say more.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records

MAIN = records.ROOT / "main.py"
PLUGIN = """
import os
from generative_recommenders.training.step import TrainingStep
update = TrainingStep.update
def first(self, batch, step):
    update(self, batch, step)
    os._exit(0)
TrainingStep.update = first
"""
"""Python's own end, which frees what has been imported, belongs to no step."""


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command that must succeed."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, os.times()
    assert done.returncode == 0, done.stderr
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def main() -> None:
    parser = records.parser_of(__doc__, rounds=5)
    parser.add_argument("--users", type=int, default=6050, help="of the embedded data, before the filter")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "end_behind_one_step.py").write_text(PLUGIN)
        prepare = MAIN.with_name("preprocess_public_data.py")
        timed(
            [sys.executable, str(prepare), "--dataset=synthetic-books", f"--synthetic_users={args.users}"],
            folder,
        )
        step = [str(MAIN), "--plugin=end_behind_one_step.py", "--run_dir=run{}"]
        commands = {"import_torch": ["-c", "import torch"], "help": [str(MAIN), "--help"], "first_step": step}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(args.rounds + 1) if args.rounds > 1 else (1,):
            for name, command in commands.items():
                spent = timed([sys.executable, *(each.format(turn) for each in command)], folder)
                if turn:  # the first one of several fills the system's cache of files
                    times[name].append(spent)
    result: dict[str, float] = {}
    for name, spent in times.items():
        result[f"{name}_seconds"], result[f"{name}_cpu_seconds"] = map(statistics.median, zip(*spent))
    for kind in ("seconds", "cpu_seconds"):
        for name in ("help", "first_step"):
            ratio = result[f"{name}_{kind}"] / result[f"import_torch_{kind}"]
            result[f"{name}_{kind.replace('seconds', 'ratio')}"] = ratio
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    rounded = {name: round(value, 3) for name, value in result.items()}
    records.finish({"rounds": args.rounds, "threads": threads, **rounded})


if __name__ == "__main__":
    main()
