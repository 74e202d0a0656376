"""Groups of settings: types, ranges and choices of their fields. The defaults are those of the published programs.

A field has its published name; ``gin_name`` says before what. Several groups make up ``train_fn``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import Field, field_validator, model_validator

from generative_recommenders.config.fields import (
    Count,
    HiddenWidth,
    Layers,
    Length,
    NonNegative,
    Period,
    Positive,
    Section,
    Share,
    Size,
    Width,
)

Protocol = Literal["leave_one_out", "paper", "global_time"]
NegativesSharing = Literal["position", "block", "batch"]
ClassSelector = Literal["random", "target"]
NextTime = Literal["given", "hidden"]
ListReduction = Literal["sum", "mean", "max"]
GatedUnitName = Literal["swiglu", "geglu", "reglu", "glu"]
MAX_PREFETCH = 64
"""Batches that a loader makes ahead at most."""


class DataSettings(Section):
    """The data and how histories are cut. event_features: event columns that histories are read with."""

    gin_name: ClassVar[str] = "train_fn"

    dataset_name: str = "synthetic-books"
    protocol: Protocol = "leave_one_out"
    max_sequence_length: Length = 200
    gr_output_length: Annotated[int, Ge(0), Le(1 << 20)] = 10
    positional_sampling_ratio: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    event_features: tuple[str, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Rows of the position table: max_sequence_length + gr_output_length + 1, HSTU's constant divisor."""
        return self.max_sequence_length + self.gr_output_length + 1


class ModelSettings(Section):
    """The parts of the model."""

    gin_name: ClassVar[str] = "train_fn"

    main_module: str = "SASRec"
    main_module_bf16: bool = False
    input_preprocessor: str = "LearnablePositionalEmbedding"
    dropout_rate: Share = 0.2
    rating_embedding_dim: Width = 8
    num_ratings: Size = 6
    user_embedding_norm: str = "l2_norm"
    next_time: NextTime = "given"
    interaction_module_type: str = "DotProduct"
    temperature: Positive = 0.05
    top_k_method: str = "MIPSBruteForceTopK"


class ItemSettings(Section):
    """Item embeddings. category_feature: what ``embedding_module_type = "categorical"`` groups items by."""

    gin_name: ClassVar[str] = "train_fn"

    embedding_module_type: str = "local"
    item_embedding_dim: Width = 240
    item_l2_norm: bool = False
    l2_norm_eps: Positive = 1e-6
    category_feature: str | None = None


class LossSettings(Section):
    """What is learned.

    num_positives: a position predicts the next so many events (PinnerFormer, arXiv 2205.04507). target_weights: what a
    target counts, the same or its rating. mask_probability: the objective's own unless given.
    """

    gin_name: ClassVar[str] = "train_fn"

    objective: str = "causal"
    loss_module: str = "SampledSoftmaxLoss"
    loss_weights: dict[str, NonNegative] = Field(default_factory=dict)
    loss_activation_checkpoint: bool = False
    label_smoothing: Share = 0.0
    calibration: float = 0.75
    num_positives: Size = 1
    target_weights: Literal["equal", "rating"] = "equal"
    mask_probability: float | None = None
    max_span_length: Size = 5
    permute_all: bool = False
    fakes_from: Literal["batch", "catalogue"] = "batch"
    tie_discriminator: bool = False
    discriminator_weight: NonNegative = 50.0


class NegativesSettings(Section):
    """Sampled negatives. class_selector: whose class "multi-class" negatives come from, one at random or the target's."""

    gin_name: ClassVar[str] = "train_fn"

    sampling_strategy: str = "in-batch"
    num_negatives: Size = 1
    negatives_sharing: NegativesSharing = "position"
    negatives_block_size: Size = 256
    log_q_correction: bool = False
    popularity_power: float = 0.75
    mixed_shares: dict[str, NonNegative] = Field(default_factory=lambda: {"local": 0.5, "popularity": 0.5})
    class_feature: str | None = None
    class_selector: ClassSelector = "random"


class OptimizerSettings(Section):
    """Updates.

    learning_rate is that of the global batch: local_batch_size rows on each process, one mean loss over all of them.
    It is never scaled by the number of processes, so N processes of b rows train as one process of N * b.
    """

    gin_name: ClassVar[str] = "train_fn"

    optimizer: str = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-3
    num_warmup_steps: Count = 0
    max_grad_norm: Positive | None = None


class ScheduleSettings(Section):
    """The course of a run, in epochs; local_batch_size is per process."""

    gin_name: ClassVar[str] = "train_fn"

    num_epochs: Count = 101
    local_batch_size: Size = 128
    early_stopping_patience: Period | None = None
    random_seed: Count = 42
    deterministic: bool = False
    enable_tf32: bool = False


class EvaluationSettings(Section):
    """Evaluation. eval_interval is in steps, full_eval_every_n in epochs; sizes are per process."""

    gin_name: ClassVar[str] = "train_fn"

    eval_batch_size: Size = 128
    eval_user_max_batch_size: Size | None = None
    eval_bf16: bool = False
    eval_interval: Period = 100
    full_eval_every_n: Period = 1
    partial_eval_num_iters: Period = 32
    seen_filter: str = "history"
    list_metrics_k: Size | None = None
    rating_threshold: float = 4.0


class CheckpointSettings(Section):
    """Checkpoints: every so many epochs and minutes."""

    gin_name: ClassVar[str] = "train_fn"

    save_ckpt_every_n: Period = 1000
    keep_checkpoints: Period = 3
    checkpoint_minutes: Positive = 15.0


class SasrecSettings(Section):
    """``sasrec_encoder``. norm_weights and final_norm give RePlay's form of the layer."""

    gin_name: ClassVar[str] = "sasrec_encoder"

    num_blocks: Layers = 2
    num_heads: Layers = 1
    ffn_hidden_dim: Width = 64
    ffn_activation_fn: str = "relu"
    ffn_dropout_rate: Share = 0.2
    norm_weights: bool = False
    final_norm: bool = False


class HstuSettings(Section):
    """``hstu_encoder``. dqk, dv: width of a head's queries and keys, and of its values; they may differ."""

    gin_name: ClassVar[str] = "hstu_encoder"

    num_blocks: Layers = 2
    num_heads: Layers = 1
    dqk: Width = 64
    dv: Width = 64
    linear_dropout_rate: Share = 0.0
    attn_dropout_rate: Share = 0.0
    normalization: str = "rel_bias"
    linear_config: str = "uvqk"
    linear_activation: str = "silu"
    concat_ua: bool = False
    enable_relative_attention_bias: bool = True
    enable_relative_time_bias: bool = True


class DiffTransformerSettings(Section):
    """``diff_transformer_encoder``. norm: "pre" (the paper) or "post" (RePlay)."""

    gin_name: ClassVar[str] = "diff_transformer_encoder"

    num_blocks: Layers = 2
    num_heads: Layers = 1
    norm: str = "post"
    dropout_rate: Share = 0.0


class TransformerSettings(Section):
    """``transformer_encoder``: plain post-norm blocks with sinusoidal positions."""

    gin_name: ClassVar[str] = "transformer_encoder"

    num_blocks: Layers = 2
    num_heads: Layers = 1
    ffn_hidden_dim: Width = 64
    dropout_rate: Share = 0.1


class ItemTowerSettings(Section):
    """``item_tower``, for ``embedding_module_type = "item_tower"`` and ``main_module = "TwoTower"``.

    features: of the prepared items table, by name; "item_id" is the id itself. list_reduction: "sum", "mean"
    or "max" of a list's categories, of items and users. query_module: the encoder of TwoTower. query_features: of the users
    table, merged into its states.
    """

    gin_name: ClassVar[str] = "item_tower"

    features: tuple[str, ...] = ("item_id",)
    list_reduction: ListReduction = "mean"
    num_blocks: Layers = 1
    query_module: str = "SASRec"
    query_features: tuple[str, ...] = ()


class SceSettings(Section):
    """``sce``, the sizes of ScalableCrossEntropyLoss; see `objectives.scalable_cross_entropy.SCEParams`."""

    gin_name: ClassVar[str] = "sce"

    n_buckets: Size = 256
    bucket_size_x: Size = 256
    bucket_size_y: Size = 256
    mix_x: bool = False


class EncoderSettings(Section):
    """``get_sequential_encoder``."""

    gin_name: ClassVar[str] = "get_sequential_encoder"

    activation_checkpoint: bool = False


class LoaderSettings(Section):
    """``create_data_loader``. Batches are cut by one thread, prefetch_factor ahead (at most 64)."""

    gin_name: ClassVar[str] = "create_data_loader"

    prefetch_factor: Count = 2
    num_workers: Count = 0


class WeightedLossSettings(Section):
    """``get_weighted_loss``: weights of auxiliary losses, beside ``train_fn.loss_weights``."""

    gin_name: ClassVar[str] = "get_weighted_loss"

    weights: dict[str, NonNegative] = Field(default_factory=dict)


class SimilaritySettings(Section):
    """``get_similarity_function``."""

    gin_name: ClassVar[str] = "get_similarity_function"

    bf16_training: bool = False


class MoLSettings(Section):
    """Options by the names that published configurations bind on ``create_mol_interaction_module``.

    Hidden widths of 0 or below mean no hidden layer (for the query, the item and the gate's cross term).
    query_use_identity_fn, item_use_identity_fn: the first component is the embedding itself, cut to
    dot_product_dimension, and the others are one linear layer of it. Nonlinearities are gated units: swiglu, geglu,
    reglu, glu (arXiv 2002.05202). uid_embedding_hash_sizes: rows of each table of hashed user ids; every table takes
    one of the query's groups. uid_embedding_l2_weight_decay: weight of the auxiliary loss ``uid_embedding_l2_norm``,
    added to the one that ``loss_weights`` give it.
    """

    gin_name: ClassVar[str] = "create_mol_interaction_module"

    query_dot_product_groups: Layers = 8
    item_dot_product_groups: Layers = 4
    dot_product_dimension: Width = 64
    dot_product_l2_norm: bool = True
    temperature: Positive = 0.05
    query_use_identity_fn: bool = False
    query_hidden_dim: HiddenWidth = 512
    query_dropout_rate: Share = 0.0
    query_nonlinearity: GatedUnitName = "swiglu"
    item_use_identity_fn: bool = False
    item_hidden_dim: HiddenWidth = -1
    item_dropout_rate: Share = 0.0
    item_nonlinearity: GatedUnitName = "swiglu"
    gating_query_hidden_dim: HiddenWidth = 128
    gating_query_fn: bool = True
    gating_item_hidden_dim: HiddenWidth = 128
    gating_item_fn: bool = True
    gating_item_dropout_rate: Share = 0.0
    gating_qi_hidden_dim: HiddenWidth = 128
    gating_qi_dropout_rate: Share = 0.0
    gating_combination_type: Literal["glu_silu", "glu_silu_ln", "none"] = "glu_silu"
    softmax_dropout_rate: Share = 0.0
    bf16_training: bool = False
    uid_dropout_rate: Share = 0.5
    uid_embedding_hash_sizes: tuple[Size, ...] = ()
    uid_embedding_level_dropout: bool = False
    uid_embedding_l2_weight_decay: NonNegative = 0.0

    @field_validator("uid_embedding_hash_sizes", mode="before")
    @classmethod
    def _a_size_for_each_table(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"needs a size for each table, as ({value},)")
        return () if value is None else value

    @model_validator(mode="after")
    def _groups_and_gates(self) -> Self:
        tables, groups = len(self.uid_embedding_hash_sizes), self.query_dot_product_groups
        if groups <= tables:
            raise ValueError(
                f"MoL query_dot_product_groups = {groups}: must exceed the {tables} groups that uid_embedding_hash_sizes take"
            )
        if self.uid_embedding_l2_weight_decay and not tables:
            raise ValueError(
                f"MoL uid_embedding_l2_weight_decay = {self.uid_embedding_l2_weight_decay}: needs the tables of "
                "uid_embedding_hash_sizes"
            )
        if self.gating_combination_type != "none" and not (self.gating_query_fn and self.gating_item_fn):
            raise ValueError(
                f"MoL gating_combination_type = {self.gating_combination_type} multiplies two gates: "
                "set gating_query_fn and gating_item_fn, or use none"
            )
        return self
