"""Settings that main.py takes, a dry run of a run that is there, and an import in one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from generative_recommenders.commands import train
from generative_recommenders.commands.import_checkpoint import import_worker
from generative_recommenders.commands.setup import Options, run_settings
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.distributed.collectives import Collectives
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


def test_one_binding_file_or_plugin_may_be_given_as_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Options] = []
    monkeypatch.setattr(train, "launch", lambda worker, args, count: started.extend(args))
    train.train("run", "train_fn.num_epochs = 1", "a.gin", plugins="own.py")
    train.train("run", ["train_fn.num_epochs = 1"], ["a.gin"], plugins=["own.py"])
    assert started[0] == started[1]
    assert (started[0].bindings, started[0].plugins) == (("train_fn.num_epochs = 1",), ("own.py",))


@pytest.mark.parametrize(
    "given",
    ["interaction_module_type = ''", "top_k_method = 'MoLAvgTopK100'", "top_k_method = 'MoLCombTopK5_500'"],
)
def test_published_values_that_are_no_registered_names_are_taken(given: str) -> None:
    options = Options((), ("train_fn.interaction_module_type = 'MoL'", f"train_fn.{given}"), Path("data"))
    settings = run_settings(options, Collectives())
    assert RunSettings.from_json(settings.to_json()) == settings
    assert repr(settings.value("train_fn." + given.partition(" ")[0])) == given.rpartition(" ")[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train_fn.embedding_module_type", r"unknown item embedding 'nonsense' \(train_fn.embedding_module_type\)"),
        ("item_tower.query_module", r"unknown encoder 'nonsense' \(item_tower.query_module\)"),
        ("train_fn.main_module", r"unknown encoder 'nonsense' \(train_fn.main_module\)"),
    ],
)
def test_an_unknown_name_is_told_before_data_are_read(given: str, message: str) -> None:
    options = Options((), ("train_fn.main_module = 'TwoTower'", f"{given} = 'nonsense'"), Path("absent"))
    with pytest.raises(UserError, match=message):
        run_settings(options, Collectives())


@pytest.mark.parametrize("method", ["MoLCombTopK5", "MoLNaiveTopK", "TopK7"])
def test_a_search_without_its_numbers_is_named_before_data_are_read(method: str) -> None:
    options = Options((), (f"train_fn.top_k_method = {method!r}",), Path("absent"))
    with pytest.raises(UserError, match="top_k_method|k_per_group|unknown top-k module"):
        run_settings(options, Collectives()).to_json()
