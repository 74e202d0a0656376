"""Factories of a model's parts by name, under the names that gin configurations bind.

Each takes the part's name, what the program supplies, and the part's options, checked as gin checks them;
`main.py --list=encoders` and its sisters print them. UserError for unknown names and for options that cannot be.
`build_model` makes its parts by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from generative_recommenders.config.registry import (
    ENCODERS,
    INPUT_PREPROCESSORS,
    NEGATIVE_SAMPLERS,
    OUTPUT_POSTPROCESSORS,
    SIMILARITIES,
)
from generative_recommenders.errors import UserError
from generative_recommenders.modeling import input_preprocessors, output_postprocessors  # noqa: F401  (register)
from generative_recommenders.modeling.encoders import (  # noqa: F401  (register)
    diff_transformer,
    fuxi,
    hstu,
    ligr,
    sasrec,
    transformer,
    two_tower,
)
from generative_recommenders.modeling.input_preprocessors import InputPreprocessor
from generative_recommenders.modeling.similarity import dot_product  # noqa: F401  (registers)
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSimilarity
from generative_recommenders.objectives.negative_samplers import NegativesSampler, Sharing


def get_sequential_encoder(
    module_type: str,
    embedding_dim: int,
    max_length: int,
    activation_checkpoint: bool = False,
    query_encoder: Callable[[str], torch.nn.Module] | None = None,
    **options: Any,
) -> torch.nn.Module:
    """The encoder of a name, ``forward(x [T, D], layout, events) -> [T, D]``.

    embedding_dim: D. max_length: tokens of the longest history. activation_checkpoint: blocks are computed again in the
    backward pass. query_encoder: gives the query tower of "TwoTower" by its name; one with default options unless
    given.
    """
    part = ENCODERS[module_type]

    def query(own: dict[str, Any]) -> torch.nn.Module:
        name = own["query_module"]
        if name == module_type:
            raise UserError(f"item_tower.query_module {name!r} has a query tower itself: choose one that has none")
        ENCODERS.named(name, "item_tower.query_module")
        if query_encoder is not None:
            return query_encoder(name)
        return get_sequential_encoder(name, embedding_dim, max_length, activation_checkpoint)

    if activation_checkpoint and "activation_checkpoint" in part.options.model_fields:
        options["activation_checkpoint"] = True
    supplies = {"embedding_dim": embedding_dim, "max_length": max_length, "query_encoder": query}
    return cast(torch.nn.Module, part.build(options, supplies))


def get_similarity_function(
    module_type: str,
    query_embedding_dim: int,
    item_embedding_dim: int,
    bf16_training: bool = False,
    activation_checkpoint: bool = False,
    mutual_information: bool = False,
    score_dtype: torch.dtype | None = None,
    **options: Any,
) -> Similarity:
    """The similarity of a name ("" is "DotProduct") between queries ``[n, D]`` and items ``[R, D']``.

    bf16_training, activation_checkpoint, mutual_information: see `MoLSimilarity`; other similarities do without.
    score_dtype: see `DotProductSimilarity`.
    """
    part = SIMILARITIES[module_type or "DotProduct"]
    switches = {"bf16_training": bf16_training, "activation_checkpoint": activation_checkpoint}
    options |= {name: True for name, on in switches.items() if on and name in part.options.model_fields}
    supplies = {
        "query_embedding_dim": query_embedding_dim,
        "item_embedding_dim": item_embedding_dim,
        "mutual_information": mutual_information,
        "score_dtype": score_dtype,
    }
    return cast(Similarity, part.build(options, supplies))


def create_mol_interaction_module(
    query_embedding_dim: int, item_embedding_dim: int, mutual_information: bool = True, **options: Any
) -> MoLSimilarity:
    """The mixture of logits; its options are the keyword arguments of `MoLSimilarity`."""
    supplies = {
        "query_embedding_dim": query_embedding_dim,
        "item_embedding_dim": item_embedding_dim,
        "mutual_information": mutual_information,
    }
    return cast(MoLSimilarity, SIMILARITIES["MoL"].build(options, supplies))


create_mol_interaction_module.__signature__ = SIMILARITIES["MoL"].signature  # type: ignore[attr-defined]


def get_input_preprocessor(module_type: str, max_length: int, embedding_dim: int, **options: Any) -> InputPreprocessor:
    """The input preprocessor of a name. max_length: events of the longest history. embedding_dim: of the items."""
    supplies = {"max_length": max_length, "embedding_dim": embedding_dim, "item_embedding_dim": embedding_dim}
    return cast(InputPreprocessor, INPUT_PREPROCESSORS[module_type].build(options, supplies))


def get_output_postprocessor(module_type: str, embedding_dim: int, **options: Any) -> torch.nn.Module:
    """The output postprocessor of a name ("l2_norm", "layer_norm"). embedding_dim: columns that are kept of a state."""
    return cast(torch.nn.Module, OUTPUT_POSTPROCESSORS[module_type].build(options, {"embedding_dim": embedding_dim}))


def get_negatives_sampler(
    sampling_strategy: str,
    num_items: int,
    num_negatives: int,
    sharing: Sharing | None = None,
    counts: torch.Tensor | None = None,
    samplers: Callable[[dict[str, Any]], Sequence[NegativesSampler]] | None = None,
    assignment: Callable[[dict[str, Any]], torch.Tensor] | None = None,
    **options: Any,
) -> NegativesSampler:
    """The negative sampler of a name.

    num_negatives: drawn for each unit of sharing, a position by default. counts: ``[V]`` training events of each item.
    samplers, assignment: called with the options by a mixture and a sampler by class, see `MixedNegativesSampler`
    and `MultiClassNegativesSampler`.
    """
    supplies = {
        "num_items": num_items,
        "num_negatives": num_negatives,
        "sharing": sharing or Sharing(),
        "counts": counts,
        "samplers": samplers,
        "assignment": assignment,
    }
    given = {name: value for name, value in supplies.items() if value is not None}
    return cast(NegativesSampler, NEGATIVE_SAMPLERS[sampling_strategy].build(options, given))
