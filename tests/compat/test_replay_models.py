"""RePlay's SasRec and TwoTower models: training, inference, features, and refused tables."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.compat.replay.data import FeatureHint, FeatureSource, FeatureType
from generative_recommenders.compat.replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator, SumAggregator
from generative_recommenders.compat.replay.nn.embedding import SequenceEmbedding
from generative_recommenders.compat.replay.nn.ffn import SwiGLUEncoder
from generative_recommenders.compat.replay.nn.loss import CESampled
from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask
from generative_recommenders.compat.replay.nn.output import InferenceOutput, TrainOutput
from generative_recommenders.compat.replay.nn.sequential import (
    DiffTransformerLayer,
    SasRec,
    SasRecBody,
    SasRecTransformerLayer,
    TwoTower,
    TwoTowerBody,
)
from generative_recommenders.compat.replay.nn.sequential.twotower import FeaturesReader
from generative_recommenders.compat.replay.nn.transform.template import make_default_sasrec_transforms
from generative_recommenders.errors import UserError
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters

NUM_UNIQUE_ITEMS = 9


class FullSoftmax:
    """The smallest loss that keeps the protocol, without negatives in its signature."""

    def __call__(self, model_embeddings, positive_labels, target_padding_mask):
        logits = self.logits_callback(model_embeddings)
        picked = logits.log_softmax(-1).gather(-1, positive_labels.clamp(max=logits.shape[-1] - 1))
        return -picked[target_padding_mask].mean()


class SampledSoftmax:
    """A loss that takes everything, and scores given ids through the callback."""

    def __call__(self, **arguments):
        self.seen = set(arguments)
        kept = arguments["target_padding_mask"]
        queries = arguments["model_embeddings"].unsqueeze(2).expand(*kept.shape, -1)[kept]
        labels = arguments["positive_labels"][kept]
        positive = self.logits_callback(queries, labels[:, None])
        negative = self.logits_callback(queries, arguments["negative_labels"])
        return -torch.cat([positive, negative], -1).log_softmax(-1)[:, 0].mean()


def _item(width: int = 8, cardinality: int = NUM_UNIQUE_ITEMS) -> TensorFeatureInfo:
    return TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=width,
        padding_value=NUM_UNIQUE_ITEMS,
        cardinality=cardinality,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )


def _batch() -> dict:
    items = torch.tensor([[9, 9, 3, 1], [0, 4, 8, 2]])
    labels = torch.tensor([[9, 9, 1, 5], [4, 8, 2, 7]])[..., None]
    return {
        "feature_tensors": {"item_id": items},
        "padding_mask": items != 9,
        "positive_labels": labels,
        "target_padding_mask": labels != 9,
    }


def _sasrec(loss=None, encoder=None) -> SasRec:
    schema = TensorSchema([_item(width=8)])
    body = SasRecBody(
        embedder=SequenceEmbedding(schema=schema),
        embedding_aggregator=PositionAwareAggregator(SumAggregator(8), max_sequence_length=6, dropout=0.0),
        attn_mask_builder=DefaultAttentionMask(schema.item_id_feature_name, num_heads=2),
        encoder=encoder or SasRecTransformerLayer(8, 2, 2, 0.0, activation="relu"),
        output_normalization=torch.nn.LayerNorm(8),
    )
    return SasRec(body=body, loss=loss or FullSoftmax())


def _train(model: torch.nn.Module, steps: int = 30, **extra) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        output = model(**_batch(), **extra)
        assert isinstance(output, TrainOutput)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses


@pytest.mark.parametrize("encoder", ["sasrec", "diff"])
def test_sasrec_learns_its_batch(encoder: str) -> None:
    torch.manual_seed(0)
    model = _sasrec(encoder=DiffTransformerLayer(8, 2, 2) if encoder == "diff" else None)
    losses = _train(model)
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    logits = model(_batch()["feature_tensors"], _batch()["padding_mask"]).logits
    assert logits.argmax(-1).tolist() == [5, 7]


def test_inference_scores_the_last_position_or_the_candidates() -> None:
    model = _sasrec().eval()
    batch = _batch()
    output = model(**batch)
    assert isinstance(output, InferenceOutput)
    hidden = model.body(batch["feature_tensors"], batch["padding_mask"])
    assert torch.equal(output.hidden_states[0], hidden)
    table = model.body.embedder.get_item_weights()
    assert table.shape == (NUM_UNIQUE_ITEMS, 8)
    assert torch.allclose(output.logits, hidden[:, -1] @ table.T, atol=1e-6)
    candidates = torch.tensor([7, 0, 3])
    chosen = model(batch["feature_tensors"], batch["padding_mask"], candidates).logits
    assert torch.allclose(chosen, output.logits[:, candidates], atol=1e-6)
    per_row = torch.tensor([[1, 2], [8, 0]])
    chosen = model(batch["feature_tensors"], batch["padding_mask"], per_row).logits
    assert torch.allclose(chosen, output.logits.gather(1, per_row), atol=1e-6)


def test_left_padding_changes_nothing() -> None:
    model = _sasrec().eval()
    batch = _batch()
    row = batch["feature_tensors"]["item_id"][:1]
    padded = model({"item_id": row}, row != 9).logits
    short = model({"item_id": row[:, 2:]}, row[:, 2:] != 9).logits
    assert torch.allclose(padded, short, atol=1e-6)


def test_a_loss_gets_what_it_accepts() -> None:
    loss = SampledSoftmax()
    losses = _train(_sasrec(loss), steps=5, negative_labels=torch.tensor([0, 6]))
    assert loss.seen == {
        "model_embeddings",
        "feature_tensors",
        "positive_labels",
        "negative_labels",
        "padding_mask",
        "target_padding_mask",
    }
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("missing", ["positive_labels", "negative_labels", "target_padding_mask"])
def test_what_a_loss_needs_and_is_not_given_is_named(missing: str) -> None:
    given = _batch() | {"negative_labels": torch.tensor([0, 6])}
    del given[missing]
    with pytest.raises(UserError, match=f"{missing} (are|is) missing"):
        _sasrec(CESampled())(**given)


def test_a_copied_model_scores_with_its_own_items() -> None:
    model = copy.deepcopy(_sasrec())
    with torch.no_grad():
        model.body.embedder.embedder("item_id").emb.weight.zero_()
    assert (model.loss.logits_callback(torch.ones(2, 8)) == 0).all()


def _two_tower_schema(c: dict) -> TensorSchema:
    def feature(name, kind, cardinality=None):
        source = TensorFeatureSource(FeatureSource.ITEM_FEATURES, name)
        hint = FeatureHint.ITEM_ID if name == "item_id" else None
        padding = cardinality or 0
        return TensorFeatureInfo(name, kind, True, hint, [source], cardinality, padding, c["D"])

    return TensorSchema(
        [
            feature("item_id", FeatureType.CATEGORICAL, c["V"]),
            feature("cat", FeatureType.CATEGORICAL, c["C"]),
            feature("tags", FeatureType.CATEGORICAL_LIST, c["T"]),
            feature("price", FeatureType.NUMERICAL),
        ]
    )


def _two_tower(c: dict, schema: TensorSchema, reader, agg: str = "sum", query=None, item=None, **options) -> TwoTower:
    aggregator = SumAggregator(c["D"])
    encoder = SasRecTransformerLayer(c["D"], c["heads"], c["num_blocks"], 0.0, "relu", c["hidden"])
    body = TwoTowerBody(
        schema=schema,
        embedder=SequenceEmbedding(schema, categorical_list_feature_aggregation_method=agg),
        attn_mask_builder=DefaultAttentionMask(schema.item_id_feature_name, c["heads"]),
        query_tower_feature_names=query or schema.names,
        item_tower_feature_names=item or schema.names,
        query_embedding_aggregator=PositionAwareAggregator(aggregator, c["max_len"], 0.0),
        item_embedding_aggregator=aggregator,
        query_encoder=encoder,
        query_tower_output_normalization=torch.nn.LayerNorm(c["D"]),
        item_encoder=SwiGLUEncoder(c["D"], 2 * c["D"]),
        item_features_reader=reader,
    )
    return TwoTower(body, FullSoftmax(), **options)


def test_two_tower_parity() -> None:
    golden = load_golden("replay_two_tower")
    prefix = "body.item_tower.item_reference_"
    reader = {k.removeprefix(prefix): v for k, v in golden.parameters.items() if k.startswith(prefix)}
    parameters = {k: v for k, v in golden.parameters.items() if not k.startswith(prefix)}
    model = _two_tower(golden.config, _two_tower_schema(golden.config), reader, golden.config["agg"]).eval()
    load_parameters(model, parameters)
    features = {k.removeprefix("feature/"): v for k, v in golden.inputs.items() if k.startswith("feature/")}
    real, candidates = golden.inputs["padding_mask"], golden.inputs["candidates"]

    output = model(features, real)
    assert_near(output.hidden_states[0][real], golden.outputs["query_hidden"][real])
    assert_near(output.hidden_states[0][:, -1], golden.outputs["query_last"])
    assert_near(model.body.item_tower(), golden.outputs["items_all"])
    assert_near(model.body.item_tower(candidates), golden.outputs["items_candidates"])
    assert_near(output.logits, golden.outputs["logits_all"])
    assert_near(model(features, real, candidates).logits, golden.outputs["logits_candidates"])
    assert_gradients(golden, output.logits, module=model)


TOWER = {"V": 9, "C": 4, "T": 6, "D": 8, "heads": 2, "num_blocks": 1, "max_len": 6, "hidden": None}


def _item_table() -> dict[str, list]:
    ids = [3, 0, 1, 2, 8, 7, 6, 5, 4]
    return {
        "item_id": ids,
        "cat": [i % 4 for i in ids],
        "tags": [[i % 6] * (1 + i % 3) for i in ids],
        "price": [float(i) for i in ids],
    }


def _write(path: Path, columns: dict[str, list]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


METADATA = {"item_id": {}, "cat": {}, "tags": {"shape": 4, "padding": 6}, "price": {}}


def test_each_tower_reads_its_own_features() -> None:
    """A history of ids and prices, items of ids and categories: what one does not read, it need not be given."""
    schema = _two_tower_schema(TOWER)
    reader = {"item_id": torch.arange(9), "cat": torch.arange(9) % 4}
    history = {"item_id": torch.tensor([[3, 1], [0, 4]]), "price": torch.rand(2, 2)}
    model = _two_tower(TOWER, schema, reader, query=["item_id", "price"], item=["item_id", "cat"]).eval()
    real = torch.ones(2, 2, dtype=torch.bool)
    logits = model(history, real).logits
    for feature, moves_query, moves_items in (("price", True, False), ("cat", False, True), ("tags", False, False)):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in changed.body.embedder.embedder(feature).parameters():
                parameter.add_(1.0)
        assert torch.equal(changed.body(history, real), model.body(history, real)) != moves_query, feature
        assert torch.equal(changed.body.item_tower(), model.body.item_tower()) != moves_items, feature
        assert torch.equal(changed(history, real).logits, logits) != (moves_query or moves_items), feature


def test_features_reader_orders_rows_and_pads_lists(tmp_path: Path) -> None:
    path = _write(tmp_path / "items.parquet", _item_table())
    reader = FeaturesReader(schema=_two_tower_schema(TOWER), metadata=METADATA, path=path)
    assert reader["item_id"].tolist() == list(range(9))
    assert reader["price"].dtype == torch.float32
    assert reader["cat"].tolist() == [i % 4 for i in range(9)]
    assert reader["tags"][4].tolist() == [6, 6, 4, 4]
    assert reader.feature_names == list(METADATA)
    with pytest.raises(UserError, match="colour"):
        reader["colour"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"item_id": [3, 0, 1, 2, 9, 7, 6, 5, 4]}, r"missing: \[8\]"),
        ({"item_id": [3, 0, 1, 2, 8, 7, 6, 5, 5]}, r"missing: \[4\]"),
        ({"cat": [0] * 8 + [None]}, "empty"),
        ({"tags": [[0] * 5] * 9}, "metadata allows 4"),
        ({"cat": [0] * 7 + [7, -1]}, r"'cat': 2 of 9 values are not categories 0..3, the first is 7"),
        ({"tags": [[9]] * 9}, r"'tags': 9 of 9 values are not categories 0..5"),
        ({"price": [0.0] * 8 + [float("nan")]}, "'price': 1 of 9 values are not finite numbers"),
        ({"tags": [0] * 9}, "'tags': .*int64"),
        ({"cat": ["a"] * 9}, "'cat': it holds string, no numbers"),
    ],
)
def test_bad_item_tables_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    path = _write(tmp_path / "items.parquet", _item_table() | change)
    with pytest.raises(UserError, match=words):
        FeaturesReader(_two_tower_schema(TOWER), METADATA, path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": [4]}, "'list' object cannot be interpreted as an integer"),
        ({"shape": "4"}, "'str' object cannot be interpreted as an integer"),
        ({"shape": np.int64(2)}, "a list of 3 entries, metadata allows 2"),
        ({"padding": None}, "NoneType"),
    ],
)
def test_metadata_that_are_no_numbers_are_refused(tmp_path: Path, settings: dict, words: str) -> None:
    path = _write(tmp_path / "items.parquet", _item_table())
    with pytest.raises(UserError, match=f"'tags': .*{words}"):
        FeaturesReader(_two_tower_schema(TOWER), {"tags": settings}, path)


def test_missing_files_columns_items_and_features_are_named(tmp_path: Path) -> None:
    schema = _two_tower_schema(TOWER)
    with pytest.raises(UserError, match="there is no Parquet file"):
        FeaturesReader(schema, METADATA, tmp_path / "none.parquet")
    table = _item_table()
    path = _write(tmp_path / "a.parquet", {k: v for k, v in table.items() if k != "cat"})
    with pytest.raises(UserError, match="no column 'cat'"):
        FeaturesReader(schema, METADATA, path)
    with pytest.raises(UserError, match="colour"):
        FeaturesReader(schema, {"colour": {}}, path)
    few = _write(tmp_path / "b.parquet", {k: v[:4] for k, v in table.items()})
    with pytest.raises(UserError, match="4 rows, the schema has 9 items"):
        _two_tower(TOWER, schema, FeaturesReader(schema, METADATA, few))


class LastItemGate(torch.nn.Module):
    """A context merger that zeroes hidden states of rows whose first feature value is 0."""

    def forward(self, model_hidden_state, feature_tensors):
        return model_hidden_state * (feature_tensors["item_id"][:, :1, None] != 0)


def test_context_merger_changes_what_is_scored() -> None:
    schema = TensorSchema([_item(width=8)])
    reader = {"item_id": torch.arange(NUM_UNIQUE_ITEMS)}
    model = _two_tower(TOWER, schema, reader, context_merger=LastItemGate()).eval()
    output = model(_batch()["feature_tensors"], _batch()["padding_mask"])
    assert len(output.hidden_states) == 2
    assert (output.logits[1] == 0).all() and (output.logits[0] != 0).any()
    model.train()
    assert len(model(**_batch()).hidden_states) == 2


@pytest.mark.parametrize("name", ["SasRec", "TwoTower"])
def test_from_params(name: str) -> None:
    torch.manual_seed(0)
    noise = TensorFeatureInfo("time", FeatureType.NUMERICAL, True, FeatureHint.TIMESTAMP)
    schema = TensorSchema([_item(width=64), noise])
    options = {"embedding_dim": 8, "num_heads": 2, "num_blocks": 1, "max_sequence_length": 6, "dropout": 0.0}
    if name == "SasRec":
        model = SasRec.from_params(schema, **options)
    else:
        model = TwoTower.from_params(schema, {"item_id": torch.arange(NUM_UNIQUE_ITEMS)}, **options)
    losses = _train(model)
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    logits = model(_batch()["feature_tensors"], _batch()["padding_mask"]).logits
    assert logits.shape == (2, NUM_UNIQUE_ITEMS)


def test_documented_sasrec_example_with_padding_inside_the_cardinality() -> None:
    schema = TensorSchema([_item(width=8, cardinality=NUM_UNIQUE_ITEMS + 1)])
    embedder = SequenceEmbedding(schema=schema)
    assert torch.equal(embedder.get_item_weights(), embedder.get_item_weights(torch.arange(NUM_UNIQUE_ITEMS)))
    padding = torch.tensor([schema.item_id_features.item().padding_value])
    assert (embedder({"item_id": padding})["item_id"] == 0).all()


@pytest.mark.parametrize("padding", [0, NUM_UNIQUE_ITEMS - 2])
def test_items_beyond_the_padding_id_are_no_columns_of_scores(padding: int) -> None:
    """The default padding_value is such a one; items by their ids are scored all the same."""
    model = SasRec.from_params(TensorSchema([replace(_item(), padding_value=padding)]), 8, 2, 1, 6, 0.0).eval()
    history = torch.tensor([[3, 1]])
    given = {"item_id": history}, torch.ones_like(history, dtype=torch.bool)
    assert model(*given, torch.tensor([1, 3])).logits.shape == (1, 2)
    with pytest.raises(UserError, match=rf"'item_id': padding id {padding} .* give padding_value=9 and ids from 0"):
        model(*given)


def test_schema_selects_and_refuses() -> None:
    schema = _two_tower_schema(TOWER)
    assert schema.names == ["item_id", "cat", "tags", "price"]
    assert schema.item_id_feature_name == "item_id"
    assert schema.query_id_feature_name is None
    assert schema.categorical_features.names == ["item_id", "cat", "tags"]
    assert schema.numerical_features.item().name == "price"
    assert schema.filter(feature_type=FeatureType.CATEGORICAL, name="cat").names == ["cat"]
    assert schema.subset(["price", "cat"]).names == ["price", "cat"]
    with pytest.raises(UserError, match="one feature"):
        schema.item()
    with pytest.raises(UserError, match="tensor_dim"):
        TensorFeatureInfo("x", FeatureType.CATEGORICAL, cardinality=3, tensor_dim=2)
    with pytest.raises(UserError, match="differ"):
        schema + schema


def test_who_needs_an_item_id_says_so(tmp_path: Path) -> None:
    schema = TensorSchema([replace(_item(), feature_hint=None)])
    asked = {
        "SasRec": lambda: SasRec.from_params(schema),
        "FeaturesReader": lambda: FeaturesReader(schema, {}, tmp_path / "items.parquet"),
        "make_default_sasrec_transforms": lambda: make_default_sasrec_transforms(schema),
    }
    for who, ask in asked.items():
        with pytest.raises(UserError, match=f"{who}: the schema has no item id feature"):
            ask()
