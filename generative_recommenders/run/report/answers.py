"""Answers of a run's model for its report: recommendations, attention weights, and a map of its items."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops.attention.observed import Observed, observed_weights
from generative_recommenders.retrieval.recommender import Recommender
from generative_recommenders.run.report.facts import Facts

SHOWN_HISTORY, TOP_K = 10, 10
SHOWN_TOKENS, MOST_MAPS = 14, 64
MAP_ITEMS = 2_000


@dataclass(frozen=True)
class Item:
    """An item as people read it. events: in training, None where the run does not keep the item."""

    item_id: str
    title: str | None
    genres: list[str]
    events: int | None

    @property
    def label(self) -> str:
        return self.title or self.item_id


class ItemNames(dict[str, Item]):
    """Items by their original id; one that the run does not keep has its id alone."""

    def __init__(self, items: pl.DataFrame) -> None:
        rows = items.select("item_id", "title", "genres", "events").iter_rows()
        super().__init__((row[0], Item(row[0], row[1], row[2] or [], row[3])) for row in rows)

    def __missing__(self, item_id: str) -> Item:
        return Item(item_id, None, [], None)


@dataclass(frozen=True)
class Example:
    """One user's answer. history: the last events, oldest first, of ``length``. rank: of the target, None for a
    miss."""

    user_id: str
    history: list[Item]
    length: int
    target: Item
    rank: int | None
    recommended: list[tuple[Item, float]]


@dataclass(frozen=True)
class AttentionMap:
    """Weights ``[n, n]`` of one head over the last tokens of a history: row i is what token i attends to.

    sums_to_one: whether each row of the whole history does, as those of a softmax.
    """

    title: str
    weights: np.ndarray
    tokens: list[str]
    sums_to_one: bool = True


def examples(recommender: Recommender, facts: Facts, names: ItemNames) -> list[Example]:
    """The top recommendations of the run's example users, from what they had before the test target."""
    ranks = dict(zip(facts.users["user_id"], facts.ranks(facts.methods[0])))
    found = []
    for each in facts.example_users:
        history = facts.examples.filter(pl.col("user_id") == each["user_id"])
        answer = recommender.recommend(
            history, TOP_K, exclude_seen=recommender.settings.evaluation.seen_filter != "none", at=each["at"],
            output="polars",
        )  # fmt: skip
        rank = int(ranks[each["user_id"]])
        found.append(
            Example(
                each["user_id"],
                [names[item] for item in history["item_id"].tail(SHOWN_HISTORY)],
                len(history),
                names[each["item_id"]],
                rank if rank <= facts.num_items else None,
                [(names[item], score) for item, score in answer.select("item_id", "score").iter_rows()],
            )
        )
    return found


def attention_maps(recommender: Recommender, facts: Facts, names: ItemNames) -> list[AttentionMap]:
    """Maps of every layer and head for the example user of fewest events that fill the picture, else of most events.

    Tokens are named by their items; a mask slot has a name of its own.
    """
    lengths = facts.examples.group_by("user_id").len().sort("len", "user_id")
    if not len(lengths):
        return []
    enough = lengths.filter(pl.col("len") >= SHOWN_TOKENS)
    user = (enough if len(enough) else lengths.tail(1))["user_id"][0]
    history = facts.examples.filter(pl.col("user_id") == user)
    at = next(each["at"] for each in facts.example_users if each["user_id"] == user)
    some = next(iter(recommender.reader.read(history, at, 1, warn=False)), None)
    if some is None:
        return []
    layers = layer_weights(recommender.model, some.batch)
    tokens = [names[item].label for item in history["item_id"].tail(int(some.batch["lengths"][0]))]
    if recommender.model.sequence.preprocessor.tokens_per_item > 1:  # ratings are tokens too
        tokens = [f"{name}{part}" for name in tokens for part in ("", " (rating)")]
    numbers = [layer for layer, each in layers if not each.by]
    maps = []
    for place, (layer, (weights, by)) in enumerate(layers):
        count = weights.shape[-1]
        named = [*tokens, *["[mask]"] * (count - len(tokens))][:count][-SHOWN_TOKENS:]
        for head, own in enumerate(weights):
            title = f"layer {layer + 1}, " + (f"by {by}, all heads" if by else f"head {head + 1}")
            # Differential attention has two of them, of which the second is taken off.
            if not by and numbers.count(layer) > 1:
                title += f", attention {numbers[:place].count(layer) + 1}"
            softmax = bool(((own.sum(-1) - 1).abs() < 1e-3).all())
            maps.append(AttentionMap(title, own[-SHOWN_TOKENS:, -SHOWN_TOKENS:].numpy(), named, softmax))
    return maps[:MOST_MAPS]


def layer_weights(model: SequenceRecommender, batch: Mapping[str, torch.Tensor]) -> list[tuple[int, Observed]]:
    """The attention of one history with its layer, from 0, in the order that it is computed.

    A layer is a child of one of the encoder's module lists. batch: one row of `HistoryReader.read`.
    """
    lists = [each for each in model.sequence.encoder.modules() if isinstance(each, torch.nn.ModuleList)]
    started: list[int] = []
    with observed_weights() as weights, torch.no_grad(), contextlib.ExitStack() as hooks:
        for block in lists[0] if lists else ():
            hooks.enter_context(block.register_forward_pre_hook(lambda *_: started.append(len(weights))))
        model.encode_query(batch)
    places = np.searchsorted(np.array(started, np.int64), np.arange(len(weights)), side="right") - 1
    return [(max(int(place), 0), each) for place, each in zip(places, weights)]


@dataclass(frozen=True)
class ItemMap:
    """Places ``[n, 2]`` of the items of most training events. variance: the share of it that the two axes hold."""

    places: np.ndarray
    items: list[Item]
    variance: float


def item_map(recommender: Recommender, facts: Facts) -> ItemMap | None:
    """Items as scored, in two dimensions by PCA. None for fewer than three items."""
    frame = facts.items.sort("events", "item_id", descending=[True, False]).head(MAP_ITEMS)
    ids = recommender.reader.internal(frame["item_id"])
    frame, ids = frame.filter(pl.Series(ids > 0)), ids[ids > 0]
    if len(ids) < 3:
        return None
    rows = recommender.snapshot.embeddings[torch.from_numpy(ids - 1)].float().cpu().numpy()
    names = ItemNames(frame)
    items = [names[item] for item in frame["item_id"]]
    centred = rows - rows.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    share = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-30))
    return ItemMap(centred @ directions[:2].T, items, share)
