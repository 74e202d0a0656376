"""Every configuration that is shipped builds; the published ones run on tiny data through the real program."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
from generative_recommenders.data.sequence_dataset import SequenceDataset
from generative_recommenders.gin_registry import load_settings
from generative_recommenders.modeling.encoders.two_tower import EntityFeature
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec
from generative_recommenders.training.assembly import (
    build_criterion,
    build_model,
    build_objective,
    build_sampler,
)
from tiny_data import ragged_sequences
from tiny_models import catalogue

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.gin"))
PUBLISHED = [path for path in CONFIGS if path.name.endswith("-final.gin")]
by_name = {"ids": lambda path: str(path.relative_to(ROOT / "configs").with_suffix(""))}


class MovieFeatures:
    """The features that shipped configurations read, for any number of items."""

    def read(self, names, embedding_dim, asked_by, list_reduction="mean"):
        specs = {
            "genres": EmbeddingSpec(
                "genres", "categorical_list", embedding_dim, 2, list_reduction=list_reduction
            ),
            "year": EmbeddingSpec("year", "numerical", embedding_dim),
        }
        values = {"genres": torch.ones(21, 2, dtype=torch.int64), "year": torch.zeros(21)}
        return [EntityFeature(specs[name], values[name]) for name in names]


@pytest.mark.parametrize("path", CONFIGS, **by_name)
def test_every_configuration_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # includes are found from anywhere
    settings, resolved = load_settings([path])
    data = catalogue(items=MovieFeatures())
    model = build_model(settings, data)
    criterion = build_criterion(settings, data, model)
    build_objective(settings)
    if criterion.needs_negatives:
        build_sampler(settings, data)
    assert f"train_fn.dataset_name = '{settings.train.dataset_name}'" in resolved


def test_configurations_are_there() -> None:
    folders = {path.parent.name for path in CONFIGS}
    assert folders >= {"ml-1m", "ml-20m", "amzn-books", "synthetic-books", "models", "datasets", "runs"}
    assert {path.parent.name for path in PUBLISHED} == {"ml-1m", "ml-20m", "amzn-books"}
    for folder in ("ml-1m", "ml-20m", "amzn-books"):
        names = {path.name.partition("-sampled")[0] for path in PUBLISHED if path.parent.name == folder}
        assert names >= {"hstu", "hstu-mol", "sasrec"}


SIZES = {  # blocks, heads, width of a head, width of items, negatives, sequence
    "ml-1m/hstu-sampled-softmax-n128-final": (2, 1, 50, 50, 128, 200),
    "ml-1m/hstu-sampled-softmax-n128-large-final": (8, 2, 25, 50, 128, 200),
    "ml-20m/hstu-sampled-softmax-n128-final": (4, 4, 64, 256, 128, 200),
    "ml-20m/hstu-sampled-softmax-n128-large-final": (16, 8, 32, 256, 128, 200),
    "amzn-books/hstu-sampled-softmax-n512-final": (4, 4, 16, 64, 512, 50),
    "amzn-books/hstu-sampled-softmax-n512-large-final": (16, 8, 8, 64, 512, 50),
}


@pytest.mark.parametrize(("name", "sizes"), SIZES.items(), ids=SIZES)
def test_published_sizes(name: str, sizes: tuple[int, ...]) -> None:
    settings, _ = load_settings([ROOT / "configs" / f"{name}.gin"])
    h, t = settings.hstu, settings.train
    found = (h.num_blocks, h.num_heads, h.dqk, t.item_embedding_dim, t.num_negatives, t.max_sequence_length)
    assert found == sizes
    assert (h.dv, h.linear_dropout_rate) == (h.dqk, t.dropout_rate)
    assert (t.temperature, t.item_l2_norm, t.user_embedding_norm) == (0.05, True, "l2_norm")


@pytest.mark.parametrize(
    "sweep", sorted(path for path in (ROOT / "configs" / "ablations").iterdir() if path.is_dir())
)
def test_a_sweep_changes_only_what_it_names(sweep: Path) -> None:
    """Data, epochs and learning rate are the same in all files of a folder; no two files say the same."""
    runs = [load_settings([path])[0] for path in sorted(sweep.glob("*.gin")) if path.stem != "base"]
    shared = {
        (t.dataset_name, t.max_sequence_length, t.num_epochs, t.learning_rate)
        for t in (r.train for r in runs)
    }
    assert len(shared) == 1
    assert len({str(dataclasses.asdict(run)) for run in runs}) == len(runs) > 3


@pytest.fixture(scope="module")
def data_root(ragged_dataset: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set under the names of the published configurations."""
    root = tmp_path_factory.mktemp("data")
    for name in ("ml-1m", "ml-20m", "amzn-books"):
        shutil.copytree(ragged_dataset.folder, root / "prepared" / name)
    assert ragged_dataset.num_users == len(ragged_sequences(57, 30, seed=5))
    return root


@pytest.mark.parametrize("path", PUBLISHED, **by_name)
def test_published_configurations_train_and_evaluate(
    path: Path, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, a full evaluation and the report; batches and negatives are fewer, for the sake of time."""
    bindings = (
        "train_fn.local_batch_size = 6",
        "train_fn.num_negatives = 4",
        "train_fn.eval_batch_size = 64",
    )
    options = main.Options((str(path),), bindings, data_root, str(tmp_path / "run"), False, 2, False)
    assert main.train_worker(0, 1, options) == 0
    report = capsys.readouterr().out
    assert load_settings([path])[0].train.main_module in report
    assert "most popular" in report
    assert os.listdir(tmp_path / "run" / "checkpoints")
