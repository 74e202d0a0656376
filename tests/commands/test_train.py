"""What main.py does beside training itself: a dry run of a run that is there, and an import in one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from generative_recommenders.commands.import_checkpoint import import_worker
from generative_recommenders.commands.setup import Options
from generative_recommenders.errors import UserError
from programs import run_program

RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


def test_a_dry_run_takes_the_settings_that_auto_resume_takes(tmp_path: Path) -> None:
    shutil.copytree(RELEASE / "prepared", tmp_path / "data" / "prepared")
    shutil.copytree(RELEASE / "runs" / "sasrec", tmp_path / "run")
    place = (f"--data_root={tmp_path / 'data'}", f"--run_dir={tmp_path / 'run'}")
    done = run_program("main.py", "--dry_run", "--auto_resume", *place)
    assert done.returncode == 0, done.stderr
    assert "readers" in done.stdout
    assert not (tmp_path / "data" / "prepared" / "synthetic-books").exists()


def test_an_import_refuses_several_processes() -> None:
    options = Options((), (), Path("data"), meta_checkpoint="theirs.ckpt")
    with pytest.raises(UserError, match="runs in one process: start it without torchrun"):
        import_worker(0, 2, options)
