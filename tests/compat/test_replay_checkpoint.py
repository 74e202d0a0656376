"""RePlay's checkpoints load, and RePlay's models become runs of this program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from generative_recommenders.compat.replay.checkpoint import load_replay_checkpoint, save_as_run
from generative_recommenders.compat.replay.data import FeatureType
from generative_recommenders.compat.replay.data.nn import TensorFeatureInfo
from generative_recommenders.compat.replay.nn.ffn import SwiGLUEncoder
from generative_recommenders.compat.replay.nn.sequential import SasRec, SasRecTransformerLayer, TwoTower
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.recommender import Recommender
from golden_parity import assert_near, load_golden, read_golden
from programs import run_program
from replay_scenes import item_schema
from tiny_data import ragged_sequences, tiny_dataset

NUM_ITEMS = 30


def sasrec(*further: TensorFeatureInfo) -> SasRec:
    return SasRec.from_params(item_schema(NUM_ITEMS, *further), 16, 2, 2, max_sequence_length=12)


@pytest.mark.parametrize("prefix", ["", "model.", "_model."])
def test_convolutions_of_a_checkpoint_become_linear_layers(tmp_path: Path, prefix: str) -> None:
    arrays, _ = read_golden("replay_sasrec_layer")
    golden = load_golden("replay_sasrec_layer")
    c = golden.config
    state = {prefix + key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    assert any("conv1" in name for name in state)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "last.ckpt")
    widths = c["D"], c["heads"], c["num_blocks"]
    layer = SasRecTransformerLayer(*widths, 0.0, c["activation"], c.get("hidden"))
    load_replay_checkpoint(layer, tmp_path / "last.ckpt")
    for name, value in golden.parameters.items():
        assert torch.equal(layer.state_dict()[name], value.reshape(layer.state_dict()[name].shape))
    torch.save({"state_dict": {f"{prefix}other": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="does not fit the model"):
        load_replay_checkpoint(layer, tmp_path / "other.ckpt")
    torch.save({"weights": {}}, tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="state_dict"):
        load_replay_checkpoint(layer, tmp_path / "none.ckpt")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    folder.mkdir()
    return tiny_dataset(folder, ragged_sequences(57, NUM_ITEMS, seed=5))


def scores_of(model: SasRec | TwoTower, dataset: SequenceDataset, user: int) -> torch.Tensor:
    items = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]
    window = torch.tensor(items.astype(np.int64) - 1)[None, -12:]
    return model({"item_id": window}, torch.ones_like(window, dtype=torch.bool)).logits[0]


@pytest.mark.parametrize("order", ["prepared", "reversed"])
def test_a_sasrec_becomes_a_run_with_the_same_scores(tmp_path: Path, dataset: SequenceDataset, order: str) -> None:
    torch.manual_seed(1)
    model = sasrec().eval()
    names = dataset.original_item_ids().to_pylist()
    given = None
    if order == "reversed":
        given = names[::-1]
    run = save_as_run(model, dataset.folder, tmp_path / "run", given)
    answer = Recommender.load(run)
    users = dataset.original_user_ids().to_pylist()
    for user in (0, 3, 11):
        items = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]
        history = {users[user]: [names[item - 1] for item in items]}
        scores = answer.recommend(history, k=NUM_ITEMS, exclude_seen=False)
        ids = torch.tensor([names.index(name) for name in scores["item_id"]])
        if given is not None:  # the model's own numbering
            history_ids = torch.tensor([[given.index(names[item - 1]) for item in items]])[:, -12:]
            expected = model({"item_id": history_ids}, torch.ones_like(history_ids, dtype=torch.bool)).logits[0]
            expected = expected.flip(0)
        else:
            expected = scores_of(model, dataset, user)
        assert_near(torch.tensor(scores["score"].to_numpy()), expected[ids].detach(), 1e-5)


def test_a_two_tower_over_ids_becomes_a_run_with_the_same_scores(tmp_path: Path, dataset: SequenceDataset) -> None:
    torch.manual_seed(1)
    reader = {"item_id": torch.arange(NUM_ITEMS)}
    model = TwoTower.from_params(item_schema(NUM_ITEMS), reader, 16, 2, 2, max_sequence_length=12).eval()
    answer = Recommender.load(save_as_run(model, dataset.folder, tmp_path / "run"))
    names, users = dataset.original_item_ids().to_pylist(), dataset.original_user_ids().to_pylist()
    for user in (0, 3, 11):
        items = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]
        history = {users[user]: [names[item - 1] for item in items]}
        scores = answer.recommend(history, k=NUM_ITEMS, exclude_seen=False)
        ids = torch.tensor([names.index(name) for name in scores["item_id"]])
        expected = scores_of(model, dataset, user)[ids].detach()
        assert_near(torch.tensor(scores["score"].to_numpy()), expected, 1e-4)


def test_a_session_of_such_a_run_answers_as_the_whole_history(tmp_path: Path, dataset: SequenceDataset) -> None:
    """Its positions count from the newest event, so that nothing of a history can be kept."""
    answer = Recommender.load(save_as_run(sasrec(), dataset.folder, tmp_path / "run"))
    names = dataset.original_item_ids().to_pylist()
    session = answer.session(history=names[:3])
    for item in names[3:6]:
        session = answer.append(session, item)
    whole = answer.recommend({"someone": names[:6]}, k=5)
    assert answer.recommend(session, k=5)["item_id"].tolist() == whole["item_id"].tolist()


def test_main_scores_such_a_run(tmp_path: Path, dataset: SequenceDataset) -> None:
    run = save_as_run(sasrec(), dataset.folder, tmp_path / "run")
    prepared = tmp_path / "data" / "prepared"
    prepared.mkdir(parents=True)
    (prepared / dataset.manifest.name).symlink_to(dataset.folder)
    done = run_program("main.py", "--mode=evaluate", f"--run_dir={run}", f"--data_root={tmp_path / 'data'}")
    assert done.returncode == 0, done.stderr
    assert "ndcg@10" in done.stdout.lower()


def test_models_without_a_counterpart_are_refused(tmp_path: Path, dataset: SequenceDataset) -> None:
    genre = TensorFeatureInfo("genre", FeatureType.CATEGORICAL, True, cardinality=3, padding_value=3, embedding_dim=16)
    with pytest.raises(UserError, match="only a SasRec or TwoTower over item ids alone"):
        save_as_run(sasrec(genre), dataset.folder, tmp_path / "run")
    with pytest.raises(UserError, match="item_ids lack 'i00001'"):
        save_as_run(sasrec(), dataset.folder, tmp_path / "run", ["a", "b"])
    names = dataset.original_item_ids().to_pylist()
    with pytest.raises(UserError, match="item_ids name 30 items, of which 29 differ"):
        save_as_run(sasrec(), dataset.folder, tmp_path / "run", [*names[:-1], names[0]])
    with pytest.raises(UserError, match="item_ids name 31 items, the model has 30"):
        save_as_run(sasrec(), dataset.folder, tmp_path / "run", [*map(str, range(NUM_ITEMS + 1))])
    wide = TwoTower.from_params(item_schema(NUM_ITEMS), {"item_id": torch.arange(NUM_ITEMS)}, 16, 2, 2)
    wide.body.item_tower.encoder = SwiGLUEncoder(16, 48)
    with pytest.raises(UserError, match=r"SwiGLUEncoder\(D, 2 D\)"):
        save_as_run(wide, dataset.folder, tmp_path / "run")
    turned = TwoTower.from_params(item_schema(NUM_ITEMS), {"item_id": torch.arange(NUM_ITEMS).flip(0)}, 16, 2, 2)
    with pytest.raises(UserError, match="over item ids alone"):
        save_as_run(turned, dataset.folder, tmp_path / "run")


def test_a_run_over_all_items_has_those_without_ratings(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = tiny_dataset(folder, ragged_sequences(57, NUM_ITEMS - 2, seed=5), item_features=True, unrated=2)
    assert data.num_items == NUM_ITEMS - 2
    everything = RunSettings().bind({"train_fn.catalogue": "all"})
    answer = Recommender.load(save_as_run(sasrec(), data.folder, tmp_path / "run", settings=everything))
    answered = answer.recommend({"someone": ["i00001"]}, k=NUM_ITEMS, exclude_seen=False)
    assert {"j0", "j1"} <= set(answered["item_id"])
