"""Groups of settings: types, ranges and choices of their fields. The defaults are those of the published programs.

A field has its published name; ``gin_name`` says before what. Several groups make up ``train_fn``. A field's docstring is its
description in the documentation. Options of parts are no fields: they stand in the parts' constructors, see `config.published`.
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
    PositiveInt,
    Section,
    Size,
    SuppliedTo,
    Unless,
    Width,
)

Protocol = Literal["leave_one_out", "paper", "global_time"]
NegativesSharing = Literal["position", "block", "batch"]
NextTime = Literal["given", "hidden"]
Catalogue = Literal["rated", "all"]
TrainingWindows = Literal["last", "all"]
RateSchedule = Literal["constant", "cosine"]
FeatureKind = Literal["categorical", "categorical_list", "numerical"]
ListReduction = Literal["sum", "mean", "max"]
MAX_PREFETCH = 64
"""Batches that a loader makes ahead at most."""


class DataSettings(Section):
    """The data, and how histories are cut."""

    gin_name: ClassVar[str] = "train_fn"

    dataset_name: str = "synthetic-books"
    """A prepared data set's name below ``--data_root``, or its folder."""
    protocol: Protocol = "leave_one_out"
    """What is trained on and scored: the last two items of each user held out, the published programs' last one alone,
    or times after a quantile of all."""
    catalogue: Catalogue = "rated"
    """Negatives and candidates: the rated items, or all of the item table, as the published programs have it for MovieLens."""
    max_sequence_length: Length = 200
    """Events of a history that the model reads, the newest ones."""
    gr_output_length: Annotated[int, Ge(0), Le(1 << 20)] = 10
    """Positions kept free after a history; with max_sequence_length + 1 they make HSTU's constant divisor."""
    positional_sampling_ratio: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    """Share of each history's events that an epoch trains on, drawn anew in each."""
    training_windows: TrainingWindows = "last"
    """Trained on: the last max_sequence_length targets of each history, as in the published programs, or all, a longer
    history cut into several rows."""
    event_features: tuple[str, ...] = ()
    """Event columns that histories are read with, beside the items."""

    @property
    def max_tokens(self) -> int:
        """Rows of the position table: max_sequence_length + gr_output_length + 1, HSTU's constant divisor."""
        return self.max_sequence_length + self.gr_output_length + 1


class ModelSettings(Section):
    """The parts of the model."""

    gin_name: ClassVar[str] = "train_fn"

    main_module: str = "SASRec"
    """The encoder."""
    main_module_bf16: bool = False
    """Item embeddings, the encoder's products and the scores in bfloat16, in training and evaluation. Weights, their updates
    and sums stay float32, where the published programs keep everything in bfloat16."""
    input_preprocessor: str = "LearnablePositionalEmbedding"
    """The preprocessor, which makes the encoder's inputs of item embeddings, positions and ratings."""
    user_embedding_norm: str = "l2_norm"
    """The postprocessor of the encoder's states, applied before they are scored."""
    interaction_module_type: str = "DotProduct"
    """The similarity of a state and an item; "" is "DotProduct"."""
    top_k_method: str = "MIPSBruteForceTopK"
    """The search that ``retrieval.methods.build_top_k`` makes; by mixtures of logits also approximate. Evaluation and
    recommendations do not use it: they are exact."""


class ItemSettings(Section):
    """Item embeddings."""

    gin_name: ClassVar[str] = "train_fn"

    embedding_module_type: str = "local"
    """The item embedding; TwoTower brings one of its own."""
    item_embedding_dim: Width = 240
    """Width of an item's embedding and of the encoder, D."""
    item_table: Literal["replicated", "sharded", "torchrec"] = "replicated"
    """Whether every process holds the whole item table, or a part of its rows, by the program itself or by TorchRec."""
    category_feature: Annotated[str | None, SuppliedTo("item_embeddings", "item_category")] = None
    """Item feature that ``embedding_module_type = "categorical"`` groups items by."""


class LossSettings(Section):
    """What is learned."""

    gin_name: ClassVar[str] = "train_fn"

    objective: str = "causal"
    """What is predicted from what."""
    loss_module: str = "SampledSoftmaxLoss"
    """The loss, over sampled negatives or the whole catalogue."""
    loss_weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Weights of auxiliary losses by name, as ``{"mi_loss": 0.001}`` of mixtures of logits."""
    loss_activation_checkpoint: Annotated[bool, SuppliedTo("negative_samplers")] = False
    """Scores of sampled losses are computed again in the backward pass, which saves memory."""


class NegativesSettings(Section):
    """Sampled negatives."""

    gin_name: ClassVar[str] = "train_fn"

    sampling_strategy: str = "in-batch"
    """The negative sampler."""
    num_negatives: Annotated[Size, SuppliedTo("negative_samplers", "num_negatives")] = 1
    """Negatives drawn for each unit of sharing, R."""
    negatives_sharing: Annotated[NegativesSharing, SuppliedTo("negative_samplers")] = "position"
    """Positions that share a draw of negatives: none, blocks of consecutive ones, or the whole batch."""
    negatives_block_size: Annotated[
        Size, SuppliedTo("negative_samplers"), Unless("train_fn.negatives_sharing", ("position", "batch"))
    ] = 256
    """Positions of a block, for ``negatives_sharing = "block"``."""
    class_feature: Annotated[str | None, SuppliedTo("negative_samplers", "assignment")] = None
    """Item feature whose values are the classes of the sampler "multi-class"."""


class UpdateSettings(Section):
    """Updates.

    learning_rate is that of the global batch: local_batch_size rows on each process, one mean loss over all of them.
    It is never scaled by the number of processes, so N processes of b rows train as one process of N * b.
    """

    gin_name: ClassVar[str] = "train_fn"

    optimizer: str = "adamw"
    """Rule of the item table's updates; everything else goes by AdamW."""
    learning_rate: Positive = 1e-3
    """Of the global batch; it is not scaled by the number of processes."""
    weight_decay: NonNegative = 1e-3
    """Decoupled from the gradients, as in AdamW."""
    num_warmup_steps: Count = 0
    """Steps over which the learning rate rises linearly from 0."""
    learning_rate_schedule: RateSchedule = "constant"
    """Whether the learning rate stays as it is after the warm-up, or falls along half a cosine to 0 at the run's end."""
    max_grad_norm: Positive | None = None
    """L2 norm over all gradients that they are scaled down to; None leaves them."""


class ScheduleSettings(Section):
    """The course of a run, in epochs; local_batch_size is per process."""

    gin_name: ClassVar[str] = "train_fn"

    num_epochs: Count = 101
    """Passes over the users."""
    local_batch_size: Size = 128
    """Users of a batch on each process."""
    early_stopping_patience: PositiveInt | None = None
    """Full evaluations without a better validation NDCG@10 after which a run ends; None runs on."""
    random_seed: Count = 42
    """Seed of everything that is drawn."""
    deterministic: bool = False
    """N processes drop what one would, at some cost in speed, so that a run does not depend on their number."""
    enable_tf32: bool = False
    """Products in TF32 on GPUs that have it."""


class FineTuningSettings(Section):
    """Training on from another run."""

    gin_name: ClassVar[str] = "train_fn"

    initialize_from: str | None = None
    """A run's folder (its best checkpoint) or a checkpoint to start from; rows of items and users go by their original ids."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by their names or beginnings of names, as
    ``("items.table", "sequence.encoder.blocks.0")``."""


class EvaluationSettings(Section):
    """Evaluation. Every eval_interval steps a batch of users, and in epochs between full evaluations partial_eval_num_iters
    batches, are drawn anew by the seed and scored."""

    gin_name: ClassVar[str] = "train_fn"

    eval_batch_size: Size = 128
    """Users that are scored at a time on each process."""
    eval_user_max_batch_size: Size | None = None
    """Bound of eval_batch_size, as published; None for none."""
    eval_users: PositiveInt | None = None
    """Users of each full evaluation, drawn by the seed; None for all."""
    eval_bf16: bool = False
    """The encoder's products in bfloat16 in evaluation alone, scores in float32; the published programs round states and items
    instead."""
    eval_interval: Period = 100
    """Steps from one scored batch of users to the next."""
    full_eval_every_n: Period = 1
    """Epochs from one evaluation of all users to the next."""
    partial_eval_num_iters: Annotated[PositiveInt, Unless("train_fn.full_eval_every_n", (1,))] = 32
    """Batches of users that are scored in epochs between full evaluations."""
    seen_filter: str = "history"
    """Which items are no candidates because the user had them."""
    list_metrics_k: Size | None = None
    """Length of the lists whose recall, MAP, novelty, coverage and diversity are reported; None for none."""
    rating_threshold: float = 4.0
    """Lowest rating that counts as high, in metrics of high-rated targets and in the loss by ratings."""


class CheckpointSettings(Section):
    """Checkpoints: after epochs n, 2 n and so on, counted from 0 as published, and every so many minutes."""

    gin_name: ClassVar[str] = "train_fn"

    save_ckpt_every_n: Period = 1000
    """Epochs from one checkpoint to the next, counted from 0 as published, beside those by minutes and of best epochs."""
    keep_checkpoints: PositiveInt = 3
    """Newest checkpoints that stay, beside the best one."""
    checkpoint_minutes: Positive = 15.0
    """Minutes from one checkpoint to the next, also within an epoch."""


class QuerySettings(Section):
    """The side of the query."""

    gin_name: ClassVar[str] = "item_tower"

    query_features: tuple[str, ...] = ()
    """Features of the users table that are merged into the query's states."""


class LoaderSettings(Section):
    """Loading of batches."""

    gin_name: ClassVar[str] = "create_data_loader"

    prefetch_factor: Count = 2
    """Batches that are cut ahead, at most 64."""
    num_workers: Count = 0
    """Accepted; batches are cut by one thread, which is not what a step waits for."""


class WeightedLossSettings(Section):
    """Weights of auxiliary losses, by their published function."""

    gin_name: ClassVar[str] = "get_weighted_loss"

    weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Weights of auxiliary losses by name, beside ``train_fn.loss_weights``."""


class SimilaritySettings(Section):
    """Switches that go before the options of a similarity that has them."""

    gin_name: ClassVar[str] = "get_similarity_function"

    bf16_training: Annotated[bool, OptionOf("similarities")] = False
    """A mixture of logits multiplies in bfloat16, in evaluation too, as ``train_fn.main_module_bf16`` has it do; False leaves
    the similarity's own option."""
    activation_checkpoint: Annotated[bool, OptionOf("similarities")] = False
    """A mixture of logits computes its activations again in the backward pass; False leaves its own option."""
