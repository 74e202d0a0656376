"""Top-k modules by name, and that of a run's settings."""

from __future__ import annotations

from typing import Any

import torch

from generative_recommenders.config.registry import TOP_K_MODULES, Part
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.retrieval import mol_top_k  # noqa: F401  (register)
from generative_recommenders.retrieval.top_k import TopKModule


def make_top_k(
    method: str, similarity: Similarity, item_embeddings: torch.Tensor, options: dict[str, Any] | None = None
) -> TopKModule:
    """The search of a name: of `TOP_K_MODULES`, followed by the values of its options as published
    (``MoLCombTopK5_500`` has ``k_per_group = 5`` and ``avg_top_k = 500``).

    similarity: what the model was trained with; a search for another kind of similarity is refused.
    item_embeddings: ``[V, D]``, as scored; row i belongs to id i + 1.
    """
    part, numbers = _named(method)
    of_its_own = {
        each.name
        for each in TOP_K_MODULES.parts()
        if _type_of(each) is not object and isinstance(similarity, _type_of(each))
    }
    # products are the default, and right for a plug-in's similarity too unless it has searches of its own
    if not isinstance(similarity, _type_of(part)) or (part.name == "MIPSBruteForceTopK" and of_its_own):
        raise UserError(f"train_fn.top_k_method {method} does not fit {type(similarity).__name__}")
    supplies = {"similarity": similarity, "item_embeddings": item_embeddings}
    return part.build({**(options or {}), **numbers}, supplies)


def _named(method: str) -> tuple[Part, dict[str, int]]:
    """The part of a name and the options that its numbers stand for, in the order of the constructor."""
    if method in TOP_K_MODULES:
        return TOP_K_MODULES[method], {}
    name = method.rstrip("0123456789_")
    part = TOP_K_MODULES[name if name in TOP_K_MODULES else method]
    numbers = method[len(name) :].split("_")
    names = list(part.options.model_fields)
    if len(numbers) != len(names) or not all(numbers):
        raise UserError(
            f"train_fn.top_k_method {method!r}: {name} takes {len(names)} numbers: {', '.join(names) or 'none'}"
        )
    return part, dict(zip(names, map(int, numbers)))


def build_top_k(settings: RunSettings, model: SequenceRecommender, items: torch.Tensor | None = None) -> TopKModule:
    """The search of ``train_fn.top_k_method`` over the model's items as they are now, or over others as scored."""
    method = settings.model.top_k_method
    items = model.catalogue().embeddings if items is None else items
    part, _ = _named(method)
    return make_top_k(method, model.similarity, items, settings.options.get(part.gin_name))


def check_top_k(settings: RunSettings, model: SequenceRecommender) -> None:
    """UserError where ``train_fn.top_k_method`` does not fit the model."""
    build_top_k(settings, model, torch.zeros(1, model.items.embedding_dim))


def _type_of(part: Part) -> type:
    return getattr(part.make, "similarity_type", object)
