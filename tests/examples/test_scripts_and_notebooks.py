"""The examples run as they stand: scripts, and the code of the notebooks as plain Python."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import pyplot

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def main_of(name: str) -> Callable[..., Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_the_quickstart_answers_for_a_new_reader(tmp_path: Path) -> None:
    main = main_of("quickstart")
    answer = main(tmp_path, epochs=1)
    assert answer["user_id"].unique().tolist() == ["a new reader"]
    assert answer["rank"].tolist() == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "checkpoints").is_dir()
    again = main(tmp_path, epochs=1)  # by the run that is there
    assert again.equals(answer)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    with open(file, "w", newline="") as out:
        rows = [[f"user{u}", f"thing{(u + step) % 12}", 1000 + step] for u in range(40) for step in range(6)]
        csv.writer(out).writerows([["who", "what", "when"], *rows])
    answer = main_of("own_csv")(file, tmp_path / "own", "user=who,item=what,timestamp=when", epochs=1)
    assert answer["user_id"].nunique() == 5 and answer["item_id"].str.startswith("thing").all()
    seen = {(row[0], row[1]) for row in rows}
    assert not seen & set(zip(answer["user_id"], answer["item_id"]))


def test_a_script_runs_by_the_command_that_it_names() -> None:
    """From a checkout, in which the package is not installed."""
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert {name for name, text in scripts.items() if f"python -m examples.{name}" in text} == scripts.keys()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "examples.own_csv", "no-such.csv"]
    ended = subprocess.run(command, cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode and "no-such.csv does not exist" in ended.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_and_runs_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(out["output_type"] == "display_data" for out in cells[-1]["outputs"])
    assert not any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])
    assert path.stat().st_size < 150_000
    mpl.use("Agg")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where notebooks make their folders
    try:
        exec("\n".join("".join(cell["source"]) for cell in cells), {"__name__": path.stem})
    finally:
        pyplot.close("all")  # a notebook shows its figures, and leaves them open
