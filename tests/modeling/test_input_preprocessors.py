"""Preprocessors: parity with the authors' numbers, doubled layouts, what they refuse."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.modeling.input_preprocessors import (
    CombinedItemAndRatingInputFeaturesPreprocessor,
    InputPreprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor,
    double_layout,
)
from generative_recommenders.ops.layout import AttentionMask, jagged_layout, padded_layout
from golden_encoders import ENTRANCES, choose_backend
from golden_parity import assert_near, load_golden

LAYOUTS = {"jagged": jagged_layout, "padded": padded_layout}


def rated(c: dict, rows: int) -> InputPreprocessor:
    return LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor(
        rows, c["item_embedding_dim"], 0.0, c["rating_embedding_dim"], c["num_ratings"]
    )


def combined(c: dict, rows: int) -> InputPreprocessor:
    return CombinedItemAndRatingInputFeaturesPreprocessor(rows // 2, c["item_embedding_dim"], 0.0, c["num_ratings"])


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("case", "build"), [("meta_preproc_rated", rated), ("meta_preproc_combined", combined)])
def test_parity(monkeypatch: pytest.MonkeyPatch, case: str, build, entrance: str, backend: str) -> None:
    choose_backend(monkeypatch, backend)
    golden = load_golden(case)
    preprocessor = build(golden.config, len(golden.parameters["_pos_emb.weight"]))
    names = {"_pos_emb.weight": "position", "_rating_emb.weight": "rating"}
    preprocessor.load_state_dict({names[name]: value for name, value in golden.parameters.items()})
    embeddings = golden.inputs["past_embeddings"].requires_grad_()
    layout = LAYOUTS[entrance](golden.inputs["past_lengths"], embeddings.shape[1])
    events = {"ratings": layout.flatten(golden.inputs["ratings"])}
    out = preprocessor(layout.flatten(embeddings), layout, events)
    assert torch.equal(out.layout.lengths, golden.outputs["past_lengths"])
    rectangle = out.layout.to_rectangle(out.x)
    assert_near(rectangle, golden.outputs["user_embeddings"])
    real = torch.arange(rectangle.shape[1]) < out.layout.lengths[:, None]
    assert torch.equal(real.float()[:, :, None], golden.outputs["valid_mask"])
    (rectangle * golden.inputs["cotangent"]).sum().backward()
    actual = {name: getattr(preprocessor, ours).grad for name, ours in names.items()}
    actual["past_embeddings"] = embeddings.grad
    assert set(actual) == set(golden.gradients)
    for name, expected in golden.gradients.items():
        assert_near(actual[name], expected, 1e-4)


def test_positions_count_from_the_oldest_event() -> None:
    preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(5, 4, 0.0)
    layout, items = jagged_layout(torch.tensor([3, 1]), 5), torch.randn(4, 4)
    out = preprocessor(items, layout, {})
    places = [0, 1, 2, 0]
    torch.testing.assert_close(out.x, 2 * items + preprocessor.position[places])
    assert out.read is None
    assert out.layout is layout


def test_dropout_acts_in_training_only() -> None:
    preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(5, 4, 0.5)
    layout, items = jagged_layout(torch.tensor([3, 1]), 5), torch.randn(4, 4)
    assert (preprocessor(items, layout, {}).x == 0).any()
    assert (preprocessor.eval()(items, layout, {}).x != 0).all()


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_combined_reads_the_state_after_each_rating(entrance: str) -> None:
    layout = LAYOUTS[entrance](torch.tensor([2, 1]), 2)
    events = {"ratings": torch.ones(layout.num_tokens, dtype=torch.int64)}
    out = CombinedItemAndRatingInputFeaturesPreprocessor(2, 4, 0.0, 6)(
        torch.zeros(layout.num_tokens, 4), layout, events
    )
    assert out.layout.row_of[out.read].equal(layout.row_of)
    assert out.layout.positions[out.read].equal(2 * layout.positions + 1)


def test_times_of_a_doubled_sequence() -> None:
    layout = jagged_layout(torch.tensor([2]), 2)
    events = {
        "ratings": torch.tensor([3, 4]),
        "timestamps": torch.tensor([10, 20]),
        "next_timestamps": torch.tensor([20, 35]),
    }
    out = CombinedItemAndRatingInputFeaturesPreprocessor(2, 4, 0.0, 6)(torch.zeros(2, 4), layout, events)
    assert out.events["timestamps"].tolist() == [10, 10, 20, 20]
    assert out.events["next_timestamps"].tolist() == [10, 20, 20, 35]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_attention_mask_is_doubled(entrance: str) -> None:
    layout = LAYOUTS[entrance](torch.tensor([2, 1]), 2)
    attention_mask = AttentionMask(layout.positions + 5, layout.positions + 7)
    doubled = double_layout(layout.with_attention_mask(attention_mask))
    assert doubled.attention_mask.key.tolist() == attention_mask.key.repeat_interleave(2).tolist()
    assert doubled.attention_mask.query.tolist() == attention_mask.query.repeat_interleave(2).tolist()
    assert (doubled.valid is None) == (layout.valid is None)
    assert double_layout(layout).attention_mask is None


@pytest.mark.parametrize("build", [rated, combined])
def test_missing_ratings(build) -> None:
    config = {"item_embedding_dim": 4, "rating_embedding_dim": 2, "num_ratings": 6}
    with pytest.raises(ValueError, match="Preprocessor needs ratings"):
        build(config, 6)(torch.zeros(2, 4), jagged_layout(torch.tensor([2]), 3), {})
