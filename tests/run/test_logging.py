"""Log lines: one format, on the screen and in train.log alike."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import logging

from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.logging import set_up_logging, show

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) .*")


def messages(run: Path) -> list[str]:
    """The lines of train.log, each checked, without their times."""
    lines = (run / "train.log").read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines), lines
    return [line.split(maxsplit=2)[2] for line in lines]


def test_lines_of_the_main_process_go_to_the_file_while_the_run_is_open(tmp_path: Path) -> None:
    with RunFolder.create_or_open(tmp_path):
        set_up_logging(is_main=True)
        logging.info("first %d", 1)
        logging.warning("second")
        set_up_logging(is_main=False)
        logging.warning("the main process logs this")
    logging.error("after the run")
    assert messages(tmp_path) == ["INFO first 1", "WARNING second"]


PROGRAM = """
import logging as python_logging
import sys
import warnings

from absl import app, logging

from generative_recommenders.modeling.feature_embeddings import category_ids
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.logging import set_up_logging


def main(argv):
    set_up_logging()
    logging.info("early")
    with RunFolder.create_or_open(argv[1]):
        category_ids(["new"], {"known": 1}, "genre")
        python_logging.getLogger("some.library").warning("library")
        warnings.warn("beware")


app.run(main)
"""


def test_the_screen_and_the_file_show_the_same(tmp_path: Path) -> None:
    """Lines from before the run has a folder, of this program, of another library, and warnings."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, unseen, library, warned = messages(tmp_path)
    assert (first, library) == ("INFO early", "WARNING library")
    assert unseen.startswith("WARNING feature genre: 1 values") and warned.startswith("WARNING UserWarning: beware (")
    assert done.stderr == (tmp_path / "train.log").read_text()


def test_results_and_the_error_that_ends_a_run_are_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="wrong"), RunFolder.create_or_open(tmp_path):
        show("hr@10 0.5")
        raise ValueError("wrong")
    assert messages(tmp_path) == ["INFO hr@10 0.5", "ERROR ValueError: wrong"]
    assert capsys.readouterr() == ("hr@10 0.5\n", "")
