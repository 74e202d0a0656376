"""Shipped configurations: all are built, the published ones run on tiny data through the real program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from generative_recommenders.commands import setup, train
from generative_recommenders.commands.ablation.plan import Ablation, cells_of
from generative_recommenders.commands.reproduction.lanes import lanes_of
from generative_recommenders.config.gin import load_settings
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.run.report import pictures
from tiny_data import ragged_sequences, tiny_dataset

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.gin"))
REPRODUCED = sorted((ROOT / "configs" / "reproduce").rglob("*.gin"))
CONFIGS = [p for p in sorted((ROOT / "configs").rglob("*.gin")) if p not in (*ABLATIONS, *REPRODUCED)]
PUBLISHED = [path for path in CONFIGS if path.name.endswith("-final.gin")]
by_name = {"ids": lambda path: str(path.relative_to(ROOT / "configs").with_suffix(""))}


@pytest.fixture(scope="module")
def all_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set with the item features that shipped configurations read, under all of their names."""
    root = tmp_path_factory.mktemp("all_data")
    tiny = tiny_dataset(root, ragged_sequences(57, 30, seed=5), item_features=True)
    for name in ("ml-100k", "ml-1m", "ml-20m", "ml-3b", "amzn-books", "synthetic-books", "books-2000"):
        shutil.copytree(tiny.folder, root / "prepared" / name)
    return root


@pytest.mark.parametrize("path", CONFIGS, **by_name)
def test_every_configuration_builds(
    path: Path,
    all_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the dry run."""
    monkeypatch.chdir(tmp_path)  # includes are found from anywhere
    assert_builds(path, all_data, capsys)
    assert list(tmp_path.iterdir()) == []


def assert_builds(path: Path, all_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On short histories and few negatives, for the sake of time."""
    short = (
        "train_fn.max_sequence_length = 6",
        "train_fn.num_negatives = 4",
        "train_fn.negatives_block_size = 4",
    )
    options = setup.Options((str(path),), short, all_data, None, False, None, False)
    assert train.dry_run_worker(0, 1, options) == 0
    shown = capsys.readouterr().out
    assert "MiB" in shown and "criterion" in shown


def test_configurations_are_there() -> None:
    folders = {path.parent.name for path in CONFIGS}
    assert folders >= {"ml-1m", "ml-20m", "amzn-books", "synthetic-books", "models", "datasets", "runs"}
    assert {path.parent.name for path in PUBLISHED} == {"ml-1m", "ml-20m", "ml-3b", "amzn-books"}
    for folder in ("ml-1m", "ml-20m", "amzn-books"):
        names = {path.name.partition("-sampled")[0] for path in PUBLISHED if path.parent.name == folder}
        assert names >= {"hstu", "hstu-mol", "sasrec", "sasrec-mol"}


SIZES = {  # blocks, heads, width of a head, width of items, negatives, sequence
    "ml-1m/hstu-sampled-softmax-n128-final": (2, 1, 50, 50, 128, 200),
    "ml-1m/hstu-sampled-softmax-n128-large-final": (8, 2, 25, 50, 128, 200),
    "ml-20m/hstu-sampled-softmax-n128-final": (4, 4, 64, 256, 128, 200),
    "ml-20m/hstu-sampled-softmax-n128-large-final": (16, 8, 32, 256, 128, 200),
    "ml-20m/hstu-sampled-softmax-n128-rails-final": (16, 8, 32, 256, 128, 200),
    "amzn-books/hstu-sampled-softmax-n512-rails-final": (16, 8, 8, 64, 512, 50),
    "ml-3b/hstu-sampled-softmax-n96-seqlen500-final": (4, 4, 64, 256, 128, 500),
    "ml-3b/hstu-sampled-softmax-n96-seqlen500-large-final": (16, 8, 32, 256, 128, 500),
    "amzn-books/hstu-sampled-softmax-n512-final": (4, 4, 16, 64, 512, 50),
    "amzn-books/hstu-sampled-softmax-n512-large-final": (16, 8, 8, 64, 512, 50),
}


HSTU = ("num_blocks", "num_heads", "dqk", "dv", "linear_dropout_rate")


@pytest.mark.parametrize(("name", "sizes"), SIZES.items(), ids=SIZES)
def test_published_sizes(name: str, sizes: tuple[int, ...]) -> None:
    settings = load_settings([ROOT / "configs" / f"{name}.gin"])
    sizes_of = {name: settings.value(f"hstu_encoder.{name}") for name in HSTU}
    found = (
        *list(sizes_of.values())[:3], settings.items.item_embedding_dim, settings.negatives.num_negatives,
        settings.data.max_sequence_length,
    )  # fmt: skip
    assert found == sizes
    assert sizes_of["dv"] == sizes_of["dqk"]
    assert sizes_of["linear_dropout_rate"] == settings.value("train_fn.dropout_rate")
    names = ("temperature", "item_l2_norm", "user_embedding_norm")
    assert [settings.value(f"train_fn.{name}") for name in names] == [0.05, True, "l2_norm"]


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-20m", "amzn-books"])
def test_the_mixtures_of_rails_weigh_its_auxiliary_losses(dataset: str) -> None:
    of_users = {} if dataset == "amzn-books" else {"uid_embedding_l2_norm": 0.1}
    paths = sorted((ROOT / "configs" / dataset).glob("*-mol-*-rails-final.gin"))
    assert [path.name.partition("-")[0] for path in paths] == ["hstu", "sasrec"]
    for path in paths:
        settings = load_settings([path])
        assert settings.loss.loss_weights == {**of_users, "mi_loss": 0.001}
        assert settings.schedule.num_epochs == {"ml-1m": 101, "ml-20m": 151, "amzn-books": 201}[dataset]


def test_missing_ml_3b_names_the_program_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fractal expansion .*run_fractal_expansion.py.* --name=ml-3b") as refused:
        setup.prepared_dataset("ml-3b", tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_the_cells_of_an_ablation(
    path: Path, all_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All build; data, epochs and learning rate are the same in all of them, and no two say the same."""
    ablation = Ablation.load(path, (), tmp_path)
    planned = [ablation.run(cell, 42) for cell in cells_of(ablation.settings, path)]
    for run in planned:
        run.config.parent.mkdir(parents=True)
        run.config.write_text(run.resolved)
        assert_builds(run.config, all_data, capsys)
    runs = [run.settings for run in planned]
    shared = {
        (r.data.dataset_name, r.data.max_sequence_length, r.schedule.num_epochs, r.updates.learning_rate) for r in runs
    }
    assert len(shared) == 1
    assert len({str(run.model_dump()) for run in runs}) == len(runs) > 1


@pytest.fixture(scope="module")
def data_root(ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set under the names of the published configurations."""
    root = tmp_path_factory.mktemp("data")
    for name in ("ml-1m", "ml-20m", "ml-3b", "amzn-books"):
        shutil.copytree(ragged_dataset.folder, root / "prepared" / name)
    assert ragged_dataset.num_users == len(ragged_sequences(57, 30, seed=5))
    return root


@pytest.mark.parametrize("path", PUBLISHED, **by_name)
def test_published_configurations_train_and_evaluate(
    path: Path,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two steps, a full evaluation and the report; batches and negatives are fewer, and no curves, for the sake of
    time."""
    monkeypatch.setattr(pictures, "plot_curves", lambda *arguments: None)
    bindings = (
        "train_fn.local_batch_size = 6",
        "train_fn.num_negatives = 4",
        "train_fn.eval_batch_size = 64",
    )
    run = str(tmp_path / "run")
    options = setup.Options((str(path),), bindings, data_root, run, False, 2, False, report=False)
    assert train.train_worker(0, 1, options) == 0
    report = capsys.readouterr().out
    assert load_settings([path]).model.main_module in report
    assert "most popular" in report
    assert "not the published run of this configuration" in report.strip().splitlines()[-1]
    assert os.listdir(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("path", REPRODUCED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_cells_of_a_reproduction(
    path: Path, all_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All build on the data of their folder, in the protocol that names the file."""
    (lane,) = (lane for lane in lanes_of(path.parent.name, tmp_path, None) if lane.name == path.stem)
    for cell in lane.cells:
        run = lane.run(cell, 42)
        assert run.settings.data.dataset_name == path.parent.name
        assert run.settings.data.protocol == path.stem == lane.base.data.protocol
        run.config.parent.mkdir(parents=True)
        run.config.write_text(run.resolved)
        assert_builds(run.config, all_data, capsys)
