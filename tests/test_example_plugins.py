"""The example plug-ins through main.py: trained, resumed, evaluated, listed, and missed where they are not given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from programs import ROOT, run_program

PREPARED = Path(__file__).parent / "compatibility" / "v0_1_0" / "prepared"
CASES = {
    "gru4rec": ("GRU4Rec", ["train_fn.main_module = 'GRU4Rec'", "gru4rec_encoder.hidden_dim = 12"]),
    "future": ("future", ["train_fn.objective = 'future'", "future_objective.horizon = 3"]),
    "bpr": ("BPR", ["train_fn.loss_module = 'BPR'", "bpr.margin = 0.5"]),
    "newest": ("newest", ["train_fn.sampling_strategy = 'newest'", "newest_sampler.newest = 30"]),
    "cooldown": ("cooldown", ["train_fn.seen_filter = 'cooldown'", "cooldown.days = 2.5"]),
}
SHORT = [
    "train_fn.dataset_name = 'readers'", "train_fn.max_sequence_length = 12", "train_fn.num_epochs = 2",
    "train_fn.local_batch_size = 32", "train_fn.item_embedding_dim = 16",
]  # fmt: skip


def main(*arguments: str):
    return run_program("main.py", *arguments)


@pytest.mark.parametrize("stem", CASES)
def test_a_plugin_trains_and_resumes_and_is_required_to_resume(stem: str, tmp_path: Path) -> None:
    name, own = CASES[stem]
    plugin = f"--plugin=examples/plugins/{stem}.py"
    shutil.copytree(PREPARED, tmp_path / "data" / "prepared")
    place = [f"--data_root={tmp_path / 'data'}", f"--run_dir={tmp_path / 'run'}"]
    bindings = [f"--gin_bindings={each}" for each in [*SHORT, *own]]
    trained = main(plugin, "--gin_config_file=configs/models/sasrec-d50.gin", *bindings, *place)
    assert trained.returncode == 0, trained.stderr
    assert own[1].replace("'", '"') in (tmp_path / "run" / "resolved.gin").read_text()
    saved = next((tmp_path / "run" / "checkpoints").glob("0*/settings.json"))
    (record,) = json.loads(saved.read_text())["plugins"]
    assert (record["name"], record["plugin"]) == (name, str(ROOT / "examples" / "plugins" / f"{stem}.py"))
    assert record["options"][own[1].split(" ")[0].split(".")[1]] == eval(own[1].split("= ")[1])

    missed = main("--resume", *place)
    assert missed.returncode == 2
    assert f"{name!r} comes from a plug-in: give --plugin=" in missed.stderr
    # Spawned processes load plug-ins of their own.
    processes = "--num_processes=2" if stem == "gru4rec" else "--num_processes=1"
    resumed = main(plugin, "--resume", "--gin_bindings=train_fn.num_epochs = 3", processes, *place)
    assert resumed.returncode == 0, resumed.stderr
    evaluated = main(plugin, "--mode=evaluate", *place)
    assert evaluated.returncode == 0, evaluated.stderr
    shown = "seen filter 'cooldown' (" if stem == "cooldown" else "seen filter 'history' ("
    assert shown in resumed.stdout and shown in evaluated.stdout


def test_a_changed_plugin_file_warns_on_resume(tmp_path: Path) -> None:
    plugin = Path(shutil.copy(ROOT / "examples" / "plugins" / "future.py", tmp_path / "future.py"))
    shutil.copytree(PREPARED, tmp_path / "data" / "prepared")
    place = [f"--plugin={plugin}", f"--data_root={tmp_path / 'data'}", f"--run_dir={tmp_path / 'run'}"]
    bindings = [f"--gin_bindings={each}" for each in [*SHORT, "train_fn.objective = 'future'"]]
    started = main("--max_steps=2", *bindings, *place)
    assert started.returncode == 0, started.stderr
    assert "another version" not in started.stderr
    plugin.write_text(plugin.read_text() + "# changed\n")
    resumed = main("--resume", "--max_steps=3", *place)
    assert resumed.returncode == 0, resumed.stderr
    assert f"objective 'future' was saved with another version of {plugin}" in resumed.stderr


def test_parts_are_listed_a_line_each() -> None:
    listed = main("--list=encoders", "--plugin=examples/plugins/gru4rec.py")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert {line.split(" ")[0] for line in lines} >= {"SASRec", "HSTU", "GRU4Rec"}
    assert "hidden_dim: int = 64 (>= 1, <= 4096)" in next(line for line in lines if line.startswith("GRU4Rec"))
    objectives = main("--list=objectives", "--plugin=examples/plugins/future.py").stdout
    assert "permuted (permuted_objective): mask_probability: float = 0.16" in objectives
    assert "horizon: int = 10 (>= 1, <= 1000)" in objectives
    assert "lazy_adamw (lazy_adamw): no options" in main("--list=optimizers").stdout
    losses = main("--list=losses", "--plugin=examples/plugins/bpr.py")
    assert "BPR (bpr)" in losses.stdout and "margin: float = 0.0 (>= 0)" in losses.stdout
    filters = main("--list=seen_filters", "--plugin=examples/plugins/cooldown.py").stdout.splitlines()
    assert [line.split(" ")[0] for line in filters] == ["history", "window", "none", "cooldown"]
    assert "days: float = 30.0 (> 0)" in filters[-1]


def test_published_and_own_name_of_one_option() -> None:
    clash = main("--dry_run", *(f"--gin_bindings={each}" for each in (
        "train_fn.loss_module = 'gBCE'", "train_fn.calibration = 0.5", "GBCELoss.calibration = 0.25",
    )))  # fmt: skip
    assert clash.returncode == 2
    assert "GBCELoss.calibration = 0.25 and train_fn.calibration = 0.5 are one option" in clash.stderr


def test_an_unknown_option_and_a_wrong_value_report_one_line_errors() -> None:
    for binding, message in (
        ("bpr.margn = 1.0", "bpr has no parameter 'margn'; did you mean 'margin'"),
        ("bpr.margin = -1.0", "bpr.margin must be 0 or more, got -1.0"),
        ("bpr.margin = 1e39", "bpr.margin must be 0 or of a size"),
    ):
        refused = main("--plugin=examples/plugins/bpr.py", "--dry_run", f"--gin_bindings={binding}")
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
