"""Options of the mixture of logits and the checks they must pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.mol_layers import COMBINATIONS, GATED_UNITS


@dataclass(frozen=True)
class MoLSettings:
    """Options by the names that published configurations bind on ``create_mol_interaction_module``.

    Hidden widths of 0 or below mean no hidden layer (for the query, the item and the gate's cross term).
    query_use_identity_fn, item_use_identity_fn: the first component is the embedding itself, cut to
    dot_product_dimension, and the others are one linear layer of it. Nonlinearities are gated units: swiglu, geglu,
    reglu, glu (arXiv 2002.05202). uid_embedding_hash_sizes: rows of each table of hashed user ids; every table takes
    one of the query's groups. uid_embedding_l2_weight_decay: weight of the auxiliary loss ``uid_embedding_l2_norm``,
    added to the one that ``loss_weights`` give it.
    """

    query_dot_product_groups: int = 8
    item_dot_product_groups: int = 4
    dot_product_dimension: int = 64
    dot_product_l2_norm: bool = True
    temperature: float = 0.05
    query_use_identity_fn: bool = False
    query_hidden_dim: int = 512
    query_dropout_rate: float = 0.0
    query_nonlinearity: str = "swiglu"
    item_use_identity_fn: bool = False
    item_hidden_dim: int = -1
    item_dropout_rate: float = 0.0
    item_nonlinearity: str = "swiglu"
    gating_query_hidden_dim: int = 128
    gating_query_fn: bool = True
    gating_item_hidden_dim: int = 128
    gating_item_fn: bool = True
    gating_item_dropout_rate: float = 0.0
    gating_qi_hidden_dim: int = 128
    gating_qi_dropout_rate: float = 0.0
    gating_combination_type: str = "glu_silu"
    softmax_dropout_rate: float = 0.0
    bf16_training: bool = False
    uid_dropout_rate: float = 0.5
    uid_embedding_hash_sizes: tuple[int, ...] = ()
    uid_embedding_level_dropout: bool = False
    uid_embedding_l2_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        sizes = self.uid_embedding_hash_sizes
        if isinstance(sizes, int):
            raise UserError(
                f"MoL uid_embedding_hash_sizes = {sizes}: give a size for each table, as ({sizes},)"
            )
        object.__setattr__(self, "uid_embedding_hash_sizes", tuple(sizes or ()))


def check(s: MoLSettings) -> None:
    """Raises UserError for options that are unknown, out of range or do not go together."""
    _known("query_nonlinearity", s.query_nonlinearity, GATED_UNITS)
    _known("item_nonlinearity", s.item_nonlinearity, GATED_UNITS)
    _known("gating_combination_type", s.gating_combination_type, COMBINATIONS)
    for name in ("item_dot_product_groups", "dot_product_dimension", "temperature"):
        if not getattr(s, name) > 0:
            raise UserError(f"MoL {name} = {getattr(s, name)}: must be positive")
    for field in fields(s):
        if field.name.endswith("dropout_rate") and not 0 <= getattr(s, field.name) < 1:
            raise UserError(f"MoL {field.name} = {getattr(s, field.name)}: must be in [0, 1)")
    if s.query_dot_product_groups <= len(s.uid_embedding_hash_sizes):
        raise UserError(
            f"MoL query_dot_product_groups = {s.query_dot_product_groups}: must exceed the "
            f"{len(s.uid_embedding_hash_sizes)} groups that uid_embedding_hash_sizes take"
        )
    if s.uid_embedding_l2_weight_decay < 0 or (
        s.uid_embedding_l2_weight_decay and not s.uid_embedding_hash_sizes
    ):
        raise UserError(
            f"MoL uid_embedding_l2_weight_decay = {s.uid_embedding_l2_weight_decay}: must be 0 or more, and needs "
            "the tables of uid_embedding_hash_sizes"
        )
    if any(size < 1 for size in s.uid_embedding_hash_sizes):
        raise UserError(f"MoL uid_embedding_hash_sizes = {s.uid_embedding_hash_sizes}: must be positive")
    if s.gating_combination_type != "none" and not (s.gating_query_fn and s.gating_item_fn):
        raise UserError(
            f"MoL gating_combination_type = {s.gating_combination_type} multiplies two gates: "
            "set gating_query_fn and gating_item_fn, or use none"
        )


def _known(option: str, name: str, table: Mapping[str, object]) -> None:
    if name not in table:
        raise UserError(f"MoL {option} = {name!r} is unknown: use one of {', '.join(table)}")
