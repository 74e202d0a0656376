"""Ablations: one run of main.py for each gin file of a folder, and one table; the last line is JSON.

    python benchmarks/ablation.py --epochs=30 --data_root=data --runs=runs/losses

takes configs/ablations/ml-1m-losses, SASRec under seven losses. Called again it leaves finished runs alone and goes on
with the one that was interrupted; a run made from another configuration is refused. NDCG@10 and HR@10 are of the test
targets, by the epoch that was best on validation; seconds are of training alone, the median epoch; memory is the peak of
the training process.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from generative_recommenders.config.gin import differences, load_settings
from generative_recommenders.errors import UserError
from generative_recommenders.run.directory import holds_run

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130
HEADER = (
    "| run | NDCG@10 | HR@10 | seconds per epoch | peak memory, MiB | best epoch |\n|---|--:|--:|--:|--:|--:|"
)

_CONFIGS = flags.DEFINE_string(
    "configs", str(ROOT / "configs/ablations/ml-1m-losses"), "folder of gin files; base.gin is not a run"
)
_EPOCHS = flags.DEFINE_integer("epochs", 30, "epochs of each run", lower_bound=1)
_DATA_ROOT = flags.DEFINE_string("data_root", "data", "where raw/ and prepared/ data sets lie")
_RUNS = flags.DEFINE_string(
    "runs",
    None,
    "folder of the run folders, named as the gin files; runs/ablation/NAME_OF_CONFIGS by default",
)
_ONLY = flags.DEFINE_list("only", [], "names of the gin files to run; all by default")
_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "bindings over every file")


def chosen_configs() -> list[Path]:
    """The gin files to run, by name."""
    found = {path.stem: path for path in sorted(Path(_CONFIGS.value).glob("*.gin")) if path.stem != "base"}
    unknown = [name for name in _ONLY.value if name not in found]
    if unknown or not found:
        raise UserError(
            f"{_CONFIGS.value} has no {', '.join(unknown) or 'gin file'}; it has {', '.join(found)}"
        )
    return [path for name, path in found.items() if not _ONLY.value or name in _ONLY.value]


def runs_folder() -> Path:
    """Of this sweep alone by default: sweeps share names of gin files."""
    return Path(_RUNS.value or Path("runs/ablation") / Path(_CONFIGS.value).resolve().name)


def bindings() -> list[str]:
    """What goes over every gin file."""
    return [*_BINDINGS.value, f"train_fn.num_epochs = {_EPOCHS.value}"]


def check_configuration(config: Path, run: Path) -> None:
    """UserError where the folder's run was made from other settings than these; more epochs may be asked for."""
    if not holds_run(run):
        return
    resolved = run / "resolved.gin"
    if not resolved.exists():
        raise UserError(f"{run} does not say what it was made from: give other --runs")
    made, asked = (load_settings([path], over)[0] for path, over in ((resolved, []), (config, bindings())))
    other = [each for each in differences(made, asked) if each[0] != "train_fn.num_epochs"]
    if other:
        name, before, now = other[0]
        raise UserError(
            f"{run} was made with {name} = {before!r}, {config} asks for {now!r}: give other --runs"
        )


def records(run: Path) -> list[dict[str, Any]]:
    """What the run wrote so far, without a last line that was cut off."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def row_of(run: Path) -> dict[str, Any] | None:
    """The run's line of the table; None until it has trained all of its epochs and was scored."""
    lines = records(run)
    epochs = [line for line in lines if "epoch" in line]
    if not lines or lines[-1].get("part") != "final" or len(epochs) < _EPOCHS.value:
        return None
    if len(epochs) > _EPOCHS.value:
        raise UserError(f"{run} has {len(epochs)} epochs, not {_EPOCHS.value}: give other --runs")
    final = lines[-1]
    clock = [0.0, *(line["seconds"] for line in epochs)]
    test = final["results"][final["model"]]
    return {
        "run": run.name,
        "ndcg@10": test["ndcg@10"],
        "hr@10": test["hr@10"],
        "seconds_per_epoch": statistics.median(later - before for before, later in itertools.pairwise(clock)),
        "best_epoch": max(epochs, key=lambda line: line["ndcg@10"])["epoch"] + 1,
        **{name: value for name, value in final.items() if name.startswith("peak_")},
    }


def train(config: Path, run: Path) -> int:
    """Starts or goes on with a run; its exit code."""
    command = [
        sys.executable, str(ROOT / "main.py"), f"--gin_config_file={config}", f"--run_dir={run}",
        f"--data_root={_DATA_ROOT.value}", "--num_processes=1", f"--resume={run.exists()}",
        *(f"--gin_bindings={binding}" for binding in bindings()),
    ]  # fmt: skip
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode


def markdown(rows: list[dict[str, Any]]) -> str:
    """Memory is that of the GPU where one was used."""
    lines = [
        f"| {row['run']} | {row['ndcg@10']:.4f} | {row['hr@10']:.4f} | {row['seconds_per_epoch']:.3g} "
        f"| {row.get('peak_gpu_mb', row['peak_rss_mb']):,} | {row['best_epoch']} |"
        for row in rows
    ]
    return "\n".join([HEADER, *lines])


def sweep() -> int:
    """Trains what is missing and prints the table; the exit code."""
    configs = {runs_folder() / path.stem: path for path in chosen_configs()}
    for run, config in configs.items():
        check_configuration(config, run)
    rows, failed = [], []
    for run, config in configs.items():
        code = 0 if row_of(run) else train(config, run)
        if code == INTERRUPTED:
            return code
        row = row_of(run)
        if row is None:
            failed.append({"run": config.stem, "exit_code": code})
        else:
            rows.append(row)
    print(markdown(rows))
    print(
        json.dumps({"epochs": _EPOCHS.value, "gin_bindings": _BINDINGS.value, "rows": rows, "failed": failed})
    )
    return 1 if failed else 0


def main(argv: list[str]) -> None:
    try:
        sys.exit(sweep())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
