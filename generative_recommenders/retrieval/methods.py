"""Top-k modules by name, and that of a run's settings."""

from __future__ import annotations

from typing import Any

import torch

from generative_recommenders.config.registry import TOP_K_MODULES, named_top_k
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.retrieval import mol_top_k  # noqa: F401  (register)
from generative_recommenders.retrieval.top_k import TopKModule


def make_top_k(
    method: str, similarity: Similarity, item_embeddings: torch.Tensor, options: dict[str, Any] | None = None
) -> TopKModule:
    """The search of a name, see `named_top_k`.

    similarity: what the model was trained with; a search for another kind of similarity is refused.
    item_embeddings: ``[V, D]``, as scored; row i belongs to id i + 1.
    """
    part, numbers = named_top_k(method)
    types = {each.name: getattr(each.make, "similarity_type", object) for each in TOP_K_MODULES.parts()}
    fits = isinstance(similarity, types[part.name])
    if part.name == "MIPSBruteForceTopK":
        # the default, which is right for a plug-in's similarity too unless that has searches of its own
        fits = not any(each is not object and isinstance(similarity, each) for each in types.values())
    if not fits:
        raise UserError(f"train_fn.top_k_method {method} does not fit {type(similarity).__name__}")
    supplies = {"similarity": similarity, "item_embeddings": item_embeddings}
    return part.build({**(options or {}), **numbers}, supplies)


def build_top_k(settings: RunSettings, model: SequenceRecommender, items: torch.Tensor | None = None) -> TopKModule:
    """The search of ``train_fn.top_k_method`` over the model's items as they are now, or over others as scored."""
    method = settings.model.top_k_method
    items = model.catalogue().embeddings if items is None else items
    part, _ = named_top_k(method)
    return make_top_k(method, model.similarity, items, settings.part_options(part))


def check_top_k(settings: RunSettings, model: SequenceRecommender) -> None:
    """UserError where ``train_fn.top_k_method`` does not fit the model."""
    build_top_k(settings, model, torch.zeros(1, model.items.embedding_dim))
