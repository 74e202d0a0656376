"""Groups of settings: types, ranges and choices of their fields. The defaults are those of the published programs.

A field has its published name; ``gin_name`` says before what. Several groups make up ``train_fn``. Options of parts are no
fields: they stand in the parts' constructors, see `config.published`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from generative_recommenders.config.fields import (
    Count,
    Length,
    NonNegative,
    OptionOf,
    Period,
    Positive,
    Section,
    Size,
    SuppliedTo,
    TableRows,
    Unless,
    Width,
)

Protocol = Literal["leave_one_out", "paper", "global_time"]
NegativesSharing = Literal["position", "block", "batch"]
NextTime = Literal["given", "hidden"]
Catalogue = Literal["rated", "all"]
TrainingWindows = Literal["last", "all"]
RateSchedule = Literal["constant", "cosine"]
ListReduction = Literal["sum", "mean", "max"]
MAX_PREFETCH = 64
"""Batches that a loader makes ahead at most."""


class DataSettings(Section):
    """The data and how histories are cut. event_features: event columns that histories are read with. catalogue: "all" takes
    items of the item table that nobody rated for negatives and candidates, as the published programs do of MovieLens.
    training_windows: "last" trains on each history's last max_sequence_length targets, as the published programs do; "all" on
    every target, histories that are longer cut into several rows."""

    gin_name: ClassVar[str] = "train_fn"

    dataset_name: str = "synthetic-books"
    protocol: Protocol = "leave_one_out"
    catalogue: Catalogue = "rated"
    max_sequence_length: Length = 200
    gr_output_length: Annotated[int, Ge(0), Le(1 << 20)] = 10
    positional_sampling_ratio: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    training_windows: TrainingWindows = "last"
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
    user_embedding_norm: str = "l2_norm"
    interaction_module_type: str = "DotProduct"
    top_k_method: str = "MIPSBruteForceTopK"


class ItemSettings(Section):
    """Item embeddings. category_feature: what ``embedding_module_type = "categorical"`` groups items by. item_table: whether
    every process holds the whole table, or "sharded" a part of its rows."""

    gin_name: ClassVar[str] = "train_fn"

    embedding_module_type: str = "local"
    item_embedding_dim: Width = 240
    item_table: Literal["replicated", "sharded"] = "replicated"
    category_feature: Annotated[str | None, SuppliedTo("item_embeddings", "item_category")] = None


class LossSettings(Section):
    """What is learned."""

    gin_name: ClassVar[str] = "train_fn"

    objective: str = "causal"
    loss_module: str = "SampledSoftmaxLoss"
    loss_weights: dict[str, NonNegative] = Field(default_factory=dict)
    loss_activation_checkpoint: Annotated[bool, SuppliedTo("negative_samplers")] = False


class NegativesSettings(Section):
    """Sampled negatives. class_feature: the item feature that "multi-class" negatives have in common."""

    gin_name: ClassVar[str] = "train_fn"

    sampling_strategy: str = "in-batch"
    num_negatives: Annotated[Size, SuppliedTo("negative_samplers", "num_negatives")] = 1
    negatives_sharing: Annotated[NegativesSharing, SuppliedTo("negative_samplers")] = "position"
    negatives_block_size: Annotated[
        Size, SuppliedTo("negative_samplers"), Unless("train_fn.negatives_sharing", ("position", "batch"))
    ] = 256
    class_feature: Annotated[str | None, SuppliedTo("negative_samplers", "assignment")] = None


class UpdateSettings(Section):
    """Updates.

    learning_rate is that of the global batch: local_batch_size rows on each process, one mean loss over all of them.
    It is never scaled by the number of processes, so N processes of b rows train as one process of N * b.
    learning_rate_schedule: behind the warm-up, "cosine" lowers it along half a cosine to 0 at the last of num_epochs.
    """

    gin_name: ClassVar[str] = "train_fn"

    optimizer: str = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-3
    num_warmup_steps: Count = 0
    learning_rate_schedule: RateSchedule = "constant"
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


class FineTuningSettings(Section):
    """Training on from another run. initialize_from: a run's folder (its best checkpoint) or a checkpoint. freeze: parameters
    that stay as they are, by their names or beginnings of names, as ``("items.table", "sequence.encoder.blocks.0")``.
    """

    gin_name: ClassVar[str] = "train_fn"

    initialize_from: str | None = None
    freeze: tuple[str, ...] = ()


class EvaluationSettings(Section):
    """Evaluation. eval_interval is in steps, full_eval_every_n in epochs; sizes are per process.

    Every eval_interval steps a batch of users, and in epochs between full evaluations partial_eval_num_iters batches, are drawn
    anew by the seed and scored. eval_bf16: the encoder's products in bfloat16 in evaluation, beside main_module_bf16, which
    holds in training and evaluation.
    """

    gin_name: ClassVar[str] = "train_fn"

    eval_batch_size: Size = 128
    eval_user_max_batch_size: Size | None = None
    eval_users: TableRows | None = None
    eval_bf16: bool = False
    eval_interval: Period = 100
    full_eval_every_n: Period = 1
    partial_eval_num_iters: Annotated[Period, Unless("train_fn.full_eval_every_n", (1,))] = 32
    seen_filter: str = "history"
    list_metrics_k: Size | None = None
    rating_threshold: float = 4.0


class CheckpointSettings(Section):
    """Checkpoints: behind epochs n, 2 n and so on, counted from 0 as published, and every so many minutes."""

    gin_name: ClassVar[str] = "train_fn"

    save_ckpt_every_n: Period = 1000
    keep_checkpoints: Period = 3
    checkpoint_minutes: Positive = 15.0


class QuerySettings(Section):
    """The side of the query. query_features: of the users table, merged into states."""

    gin_name: ClassVar[str] = "item_tower"

    query_features: tuple[str, ...] = ()


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
    """``get_similarity_function``: switches that go before the options of a similarity that has them; False leaves those."""

    gin_name: ClassVar[str] = "get_similarity_function"

    bf16_training: Annotated[bool, OptionOf("similarities")] = False
    activation_checkpoint: Annotated[bool, OptionOf("similarities")] = False
