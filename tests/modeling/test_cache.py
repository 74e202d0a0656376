"""Appending to encoded histories gives the numbers of encoding them from scratch, and what cannot is refused."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import HistoryCache
from generative_recommenders.modeling.encoders.diff_transformer import DiffTransformer
from generative_recommenders.modeling.encoders.fuxi import FuXi
from generative_recommenders.modeling.encoders.hstu import HSTU, HstuBlock
from generative_recommenders.modeling.encoders.ligr import LiGR
from generative_recommenders.modeling.encoders.sasrec import SASRec, SasrecBlock
from generative_recommenders.modeling.encoders.transformer import Transformer
from generative_recommenders.modeling.encoders.two_tower import EntityFeature, FeatureMerger
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec
from generative_recommenders.modeling.input_preprocessors import (
    CombinedItemAndRatingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.items import LocalEmbeddingModule
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.output_postprocessors import (
    L2NormEmbeddingPostprocessor,
    LayerNormEmbeddingPostprocessor,
)
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.objectives.masked import MaskedItemObjective
from generative_recommenders.ops.layout import AttentionMask, jagged_layout
from generative_recommenders.types import SequentialFeatures

WINDOW, DIM, ITEMS, ROWS = 12, 8, 20, 5
STEPS = ([4, 1, 0, 7, 0], [1, 3, 2, 0, 0], [2, 0, 1, 5, 0], [1, 1, 1, 0, 0])
"""New items of each row, call by call: rows begin late, pause, fill the window, and stay empty."""
HSTU_SIZES = {"num_heads": 2, "dqk": 3, "dv": 5}
ENCODERS = {
    "SASRec": lambda dim: SASRec(dim, num_heads=2),
    "SASRec-norms": lambda dim: SASRec(dim, 3, 1, norm_weights=True, final_norm=True),
    "HSTU": lambda dim: HSTU(dim, WINDOW, **HSTU_SIZES),
    "HSTU-hidden": lambda dim: HSTU(dim, WINDOW, **HSTU_SIZES, next_time="hidden"),
    "HSTU-concat": lambda dim: HSTU(dim, WINDOW, 3, 1, 4, 4, concat_ua=True),
    "HSTU-no-time-bias": lambda dim: HSTU(dim, WINDOW, **HSTU_SIZES, enable_relative_time_bias=False),
    "FuXi": lambda dim: FuXi(dim, WINDOW, **HSTU_SIZES),
    "FuXi-hidden": lambda dim: FuXi(dim, WINDOW, **HSTU_SIZES, next_time="hidden"),
    "FuXi-single-stage": lambda dim: FuXi(dim, WINDOW, **HSTU_SIZES, ffn_single_stage=True),
    "LiGR": lambda dim: LiGR(dim, num_heads=2),
    "DiffTransformer": lambda dim: DiffTransformer(dim, num_heads=2),
    "DiffTransformer-pre": lambda dim: DiffTransformer(dim, 3, norm="pre"),
    "HSTU-no-bias": lambda dim: HSTU(dim, WINDOW, **HSTU_SIZES, enable_relative_attention_bias=False),
}
PREPROCESSORS = {
    "positions": lambda: LearnablePositionalEmbeddingInputFeaturesPreprocessor(WINDOW, DIM, 0.3),
    "rated": lambda: LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor(WINDOW, DIM, 0.3, 2, 6),
    "combined": lambda: CombinedItemAndRatingInputFeaturesPreprocessor(WINDOW, DIM, 0.3, 6),
}


def build(encoder: str, preprocessor: str = "positions", **parts: torch.nn.Module) -> SequenceRecommender:
    torch.manual_seed(0)
    before = PREPROCESSORS[preprocessor]()
    inside = ENCODERS[encoder](before.embedding_dim)
    after = parts.pop("postprocessor", L2NormEmbeddingPostprocessor())
    sequence = SequenceEncoder(before, inside, after, parts.pop("context_merger", None))
    model = SequenceRecommender(LocalEmbeddingModule(ITEMS, DIM), sequence, DotProductSimilarity(), **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def histories(with_times: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """ids ``[5, 14]`` and events of the same shape, longer than any row becomes."""
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, WINDOW + 2)
    events = {"ratings": torch.randint(1, 6, shape, generator=generator)}
    if with_times:
        events["timestamps"] = torch.randint(1, 10**6, shape, generator=generator).cumsum(1)
    return torch.randint(1, ITEMS + 1, shape, generator=generator), events


def part(rectangle: torch.Tensor, first: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Columns first..first + length of each row, right-padded with 0."""
    columns = torch.arange(int(lengths.max()))
    taken = rectangle.gather(1, (first[:, None] + columns).clamp(max=rectangle.shape[1] - 1))
    return taken * (columns < lengths[:, None])


def inputs_of(
    first: torch.Tensor, lengths: torch.Tensor, with_times: bool, next_known: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    ids, events = histories(with_times)
    cut = {name: part(values, first, lengths) for name, values in events.items()}
    if next_known:
        last = events["timestamps"].gather(1, (first + lengths)[:, None])[:, 0]
        cut["next_timestamps"] = last + 1000  # of a target that need not be what arrives next
    return lengths, part(ids, first, lengths), cut


def compare(model: SequenceRecommender, with_times: bool = True, next_known: bool = True) -> None:
    """All steps, each against `encode` of the whole histories so far."""
    cache, so_far, next_known = None, torch.zeros(ROWS, dtype=torch.int64), with_times and next_known
    for step in STEPS:
        lengths = torch.tensor(step)
        states, cache = model.encode_incremental(cache, *inputs_of(so_far, lengths, with_times, next_known))
        so_far = so_far + lengths
        whole, ids, events = inputs_of(so_far * 0, so_far, with_times, next_known)
        if not next_known:
            # A free slot after every row, as the incremental entrance takes the time for unknown.
            ids, events = widen(ids), {name: widen(values) for name, values in events.items()}
        with torch.no_grad():
            expected = model.encode_query(SequentialFeatures(whole, ids, events)).states
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        assert cache.lengths.tolist() == (so_far * model.sequence.preprocessor.tokens_per_item).tolist()
    assert (states[:4].abs().sum(1) > 0).all()
    assert (states[4] == 0).all()


def test_no_histories_at_all() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    model, cache = build("HSTU"), None
    for _ in range(2):
        states, cache = model.encode_incremental(cache, nothing, torch.zeros(0, 3, dtype=torch.int64))
        assert states.shape == (0, DIM)


def test_lengths_beyond_the_columns_are_refused() -> None:
    model, ids, lengths = build("SASRec"), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([4, 1])
    with pytest.raises(UserError, match="row 0 has 4 new items and new_ids 3 columns"):
        model.encode_incremental(None, lengths, ids)
    with pytest.raises(UserError, match="lengths reach from 0 to 4, and a row has 3 columns"):
        model.encode_query({"item_ids": ids, "lengths": lengths})


def widen(rectangle: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rectangle, (0, 1))


@pytest.mark.parametrize("times", ["next_known", "next_unknown", "without"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_same_as_from_scratch(encoder: str, times: str) -> None:
    compare(build(encoder), times != "without", times == "next_known")


@pytest.mark.parametrize("encoder", ["SASRec", "HSTU"])
def test_with_ratings_and_layer_norm(encoder: str) -> None:
    compare(build(encoder, "rated", postprocessor=LayerNormEmbeddingPostprocessor()))


@pytest.mark.parametrize("encoder", ["SASRec", "HSTU"])
@pytest.mark.parametrize("times", ["next_known", "next_unknown", "without"])
def test_ratings_between_the_items(encoder: str, times: str) -> None:
    model = build(encoder, "combined")
    if encoder == "HSTU":
        torch.manual_seed(2)
        model.sequence.encoder = HSTU(DIM, 2 * WINDOW, **HSTU_SIZES).eval()
    compare(model, times != "without", times == "next_known")


@pytest.mark.parametrize("encoder", ["SASRec", "HSTU"])
def test_a_context_merger_is_given_the_users(encoder: str) -> None:
    gender = EntityFeature(EmbeddingSpec("gender", "categorical", DIM, 2), torch.tensor([0, 1, 2, 1]))
    model = build(encoder, context_merger=FeatureMerger([gender], DIM))
    cache, users = None, torch.tensor([1, 2, 3, 2, 1])
    ids, _ = histories()
    for first, stop in ((0, 4), (4, 5)):
        lengths = torch.full((ROWS,), stop - first)
        states, cache = model.encode_incremental(cache, lengths, ids[:, first:stop], {"user_ids": users})
        expected = model.encode_query(
            SequentialFeatures(torch.full((ROWS,), stop), ids[:, :stop], {"user_ids": users})
        ).states
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_two_continuations_of_one_cache_do_not_meet() -> None:
    model = build("HSTU")
    lengths = torch.full((ROWS,), 3)
    start = inputs_of(lengths * 0, lengths, True, True)
    _, cache = model.encode_incremental(None, *start)
    one = inputs_of(lengths, lengths // 3, True, True)
    first, _ = model.encode_incremental(cache, *one)
    other = (one[0], one[1] % ITEMS + 1, one[2])
    assert not torch.allclose(model.encode_incremental(cache, *other)[0], first, atol=1e-3)
    assert torch.equal(model.encode_incremental(cache, *one)[0], first)


@pytest.mark.parametrize(
    ("encoder", "times", "recomputed"),
    [("SASRec", True, 0), ("HSTU", True, 1), ("HSTU", False, 0), ("HSTU-hidden", True, 0), ("HSTU-no-bias", True, 0)],
)  # fmt: skip
def test_what_is_computed(monkeypatch: pytest.MonkeyPatch, encoder: str, times: bool, recomputed: int) -> None:
    """The new items, and the last old one of each row only where its next time became known."""
    model, tokens = build(encoder), []
    for kind in (SasrecBlock, HstuBlock):
        append = kind.over_cache
        monkeypatch.setattr(
            kind,
            "over_cache",
            lambda self, x, *rest, do=append: (tokens.append(len(x)), do(self, x, *rest))[1],
        )
    lengths = torch.full((ROWS,), 6)
    _, cache = model.encode_incremental(None, *inputs_of(lengths * 0, lengths, times, False))
    tokens.clear()
    model.encode_incremental(cache, *inputs_of(lengths, torch.tensor([2, 1, 1, 1, 1]), times, False))
    assert tokens == [6 + recomputed * ROWS] * 2


def test_a_batch_without_events() -> None:
    none, ids = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)
    for encoder in ("SASRec", "HSTU"):
        model = build(encoder)
        states, cache = model.encode_incremental(None, none, ids)
        assert torch.equal(states, torch.zeros(2, DIM))
        states, cache = model.encode_incremental(cache, none + 1, torch.tensor([[3], [4]]))
        expected = model.encode_query(SequentialFeatures(none + 1, torch.tensor([[3], [4]]), {})).states
        torch.testing.assert_close(states, expected)
        torch.testing.assert_close(model.encode_incremental(cache, none, ids)[0], expected)


def encoded(model: SequenceRecommender, length: int = 5) -> HistoryCache:
    return model.encode_incremental(None, torch.tensor([length]), torch.ones(1, length, dtype=torch.int64))[1]


@pytest.mark.parametrize("encoder", ["SASRec", "HSTU"])
def test_overflow_of_the_window(encoder: str) -> None:
    model = build(encoder)
    cache = encoded(model, WINDOW - 1)
    two = torch.ones(1, 2, dtype=torch.int64)
    model.encode_incremental(cache, torch.tensor([1]), two[:, :1])
    with pytest.raises(UserError, match=r"row 0 would hold 13 items and the window holds 12") as error:
        model.encode_incremental(cache, torch.tensor([2]), two)
    assert "\n" not in str(error.value)


def test_rows_and_events_of_the_cache() -> None:
    model = build("HSTU")
    cache, ids = encoded(model), torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(UserError, match="the cache holds 1 rows and new_lengths 2"):
        model.encode_incremental(cache, torch.tensor([1, 1]), ids)
    with pytest.raises(UserError, match=r"events none and the new items come with .*timestamps"):
        model.encode_incremental(cache, torch.tensor([1]), ids[:1], {"timestamps": ids[:1]})


def test_what_cannot_append_is_refused() -> None:
    with pytest.raises(UserError, match="built for a masked objective"):
        encoded(build("SASRec", objective=MaskedItemObjective()))
    layout = jagged_layout(torch.tensor([2]), 2)
    masked = layout.with_attention_mask(AttentionMask(layout.positions, layout.positions))
    with pytest.raises(UserError, match="only causal histories"):
        build("SASRec").sequence.append(None, torch.ones(2, DIM), masked, {})
    softmax = build("HSTU")
    softmax.sequence.encoder = HSTU(DIM, WINDOW, normalization="softmax_rel_bias").eval()
    with pytest.raises(UserError, match="normaliser of"):
        encoded(softmax)
    short = build("HSTU")
    short.sequence.encoder = HSTU(DIM, 4).eval()
    with pytest.raises(UserError, match="5 tokens, and HSTU's max_length is 4"):
        encoded(short)
    other = build("SASRec")
    other.sequence.encoder = Transformer(DIM, WINDOW).eval()
    with pytest.raises(UserError, match="Transformer keeps nothing"):
        encoded(other)
    with pytest.raises(UserError, match="training mode"):
        encoded(build("SASRec").train())
