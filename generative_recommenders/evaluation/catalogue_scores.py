"""A trained model's scores of the whole catalogue for batches of histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from generative_recommenders.data.batch_transforms import default_sasrec_transforms
from generative_recommenders.modeling.events import past_features
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSimilarity
from generative_recommenders.objectives.inference import InferenceInputs
from generative_recommenders.ops import dispatch


class CatalogueScores:
    """Scores ``[n, V]`` of evaluation batches by one state of the model; item embeddings are computed once.

    item_l2_norm: candidates are normalised, as in training. inference: how histories become inputs.
    """

    def __init__(
        self,
        model: SequenceRecommender,
        inference: InferenceInputs,
        item_l2_norm: bool,
        eps: float,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.inference, self.device = model, inference, device
        self.autocast = autocast
        self.transform = default_sasrec_transforms()["validation"]
        with torch.inference_mode():
            items = model.items.all_item_embeddings()
            items = F.normalize(items, dim=-1, eps=eps) if item_l2_norm else items
            self.scores = score_function(model.similarity, items)

    @torch.inference_mode()
    def queries(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[n, D]`` states that score the next item."""
        features = past_features(self.transform(batch))
        with dispatch.autocast(self.device, self.autocast):
            return self.inference.states(self.model, features, self.device).float()

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.scores(self.queries(batch), batch["user_ids"].to(self.device))


def score_function(
    similarity: torch.nn.Module, items: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(queries ``[n, D]``, user_ids ``[n]``) -> ``[n, V]``; what depends on ``items [V, D]`` alone is
    computed here, once.
    """
    if not isinstance(similarity, MoLSimilarity):
        transposed = items.T
        return lambda queries, user_ids: queries @ transposed
    components = similarity.item_components(items)

    def mixture(queries: torch.Tensor, user_ids: torch.Tensor) -> torch.Tensor:
        query, _ = similarity.query_components(queries, user_ids)
        return similarity.score_components(query, components)[0]

    return mixture
