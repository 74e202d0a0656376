"""Groups of settings: types, ranges and choices of their fields. The defaults are those of the published programs.

A field has its published name; ``gin_name`` says before what. Several groups make up ``train_fn``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from generative_recommenders.config.fields import (
    Count,
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


class QuerySettings(Section):
    """The side of the query. query_module: the encoder of TwoTower. query_features: of the users table, merged into states."""

    gin_name: ClassVar[str] = "item_tower"

    query_module: str = "SASRec"
    query_features: tuple[str, ...] = ()


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
    activation_checkpoint: bool = False
