"""Groups of settings: types, ranges and choices of their fields. The defaults are those of the published programs.

A field has its published name; ``gin_name`` says before what. Several groups make up ``train_fn``. A field's docstring
is its description in the documentation. Options of parts are no fields: they stand in the parts' constructors, see
`config.published`.
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
    Unless,
    UsedBy,
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


class TrainSection(Section):
    """Settings of ``train_fn``."""

    gin_name: ClassVar[str] = "train_fn"


class DataSettings(TrainSection):
    """The data, and how histories are cut."""

    dataset_name: str = "synthetic-books"
    """A prepared data set's name below ``--data_root``, or its folder."""
    protocol: Protocol = "leave_one_out"
    """Which events are for validation and test: the last two of each user, only the last one, as in the published
    programs, or those after a quantile of all times."""
    catalogue: Catalogue = "rated"
    """Negatives and candidates: the rated items, or all of the item table, as the published programs have it for
    MovieLens."""
    max_sequence_length: Length = 200
    """Events of a history that the model reads, the newest ones."""
    gr_output_length: Annotated[int, Ge(0), Le(1 << 20)] = 10
    """Positions kept free after a history; with max_sequence_length + 1 they make HSTU's constant divisor."""
    positional_sampling_ratio: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    """Share of each history's events that an epoch trains on, drawn anew in each."""
    training_windows: TrainingWindows = "last"
    """Targets trained on: the last max_sequence_length of each history, as in the published programs, or all, for which
    a longer history is cut into several rows."""
    event_features: tuple[str, ...] = ()
    """Event columns that are inputs of the model, beside the items."""

    @property
    def max_tokens(self) -> int:
        """Rows of the position table: max_sequence_length + gr_output_length + 1, HSTU's constant divisor."""
        return self.max_sequence_length + self.gr_output_length + 1


class ModelSettings(TrainSection):
    """The parts of the model."""

    main_module: str = "SASRec"
    """The encoder: a name of ``--list=encoders``."""
    main_module_bf16: bool = False
    """Item embeddings, the encoder's products and the scores in bfloat16, in training and evaluation. Weights, their
    updates and sums stay float32, where the published programs keep everything in bfloat16."""
    input_preprocessor: str = "LearnablePositionalEmbedding"
    """Makes the encoder's inputs of item embeddings, positions and ratings: a name of
    ``--list=input_preprocessors``."""
    user_embedding_norm: str = "l2_norm"
    """Normalises the encoder's states before they are scored: a name of ``--list=output_postprocessors``."""
    interaction_module_type: str = "DotProduct"
    """The similarity of a state and an item: a name of ``--list=similarities``, or "", which is "DotProduct"."""
    top_k_method: str = "MIPSBruteForceTopK"
    """The search that ``retrieval.methods.build_top_k`` makes; by mixtures of logits also approximate. Evaluation and
    recommendations do not use it: they are exact."""


class ItemSettings(TrainSection):
    """Item embeddings."""

    embedding_module_type: str = "local"
    """The item embedding: a name of ``--list=item_embeddings``; TwoTower brings its own."""
    item_embedding_dim: Width = 240
    """Width of an item's embedding and of the encoder, D."""
    item_table: Literal["replicated", "sharded", "torchrec"] = "replicated"
    """Whether each process holds all rows of the item table, or a part of them, kept by this program or by TorchRec."""
    category_feature: Annotated[str | None, UsedBy("item_embeddings", "item_category")] = None
    """Item feature that ``embedding_module_type = "categorical"`` groups items by."""


class LossSettings(TrainSection):
    """What is learned."""

    objective: str = "causal"
    """What is predicted from what: a name of ``--list=objectives``."""
    loss_module: str = "SampledSoftmaxLoss"
    """The loss, over sampled negatives or the whole catalogue: a name of ``--list=losses``."""
    loss_weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Weights of auxiliary losses by name, as ``{"mi_loss": 0.001}`` of mixtures of logits."""
    loss_activation_checkpoint: Annotated[bool, UsedBy("negative_samplers")] = False
    """Scores of sampled losses are computed again in the backward pass, which saves memory."""


class NegativesSettings(TrainSection):
    """Sampled negatives."""

    sampling_strategy: Annotated[str, UsedBy("negative_samplers")] = "in-batch"
    """The negative sampler: a name of ``--list=negative_samplers``."""
    num_negatives: Annotated[Size, UsedBy("negative_samplers", "num_negatives")] = 1
    """Negatives drawn for each unit of sharing, R."""
    negatives_sharing: Annotated[NegativesSharing, UsedBy("negative_samplers")] = "position"
    """Positions that share a draw of negatives: none, blocks of consecutive ones, or the whole batch."""
    negatives_block_size: Annotated[
        Size, UsedBy("negative_samplers"), Unless("train_fn.negatives_sharing", ("position", "batch"))
    ] = 256
    """Positions of a block, for ``negatives_sharing = "block"``."""
    class_feature: Annotated[str | None, UsedBy("negative_samplers", "assignment")] = None
    """Item feature whose values are the classes of the sampler "multi-class"."""


class UpdateSettings(TrainSection):
    """Updates.

    learning_rate is that of the global batch: local_batch_size rows on each process, one mean loss over all of them.
    It is never scaled by the number of processes, so N processes of b rows train as one process of N * b.
    """

    optimizer: str = "adamw"
    """The optimizer of the item table, a name of ``--list=optimizers``; other parameters are updated by AdamW."""
    learning_rate: Positive = 1e-3
    """Learning rate for the global batch; it is not scaled by the number of processes."""
    weight_decay: NonNegative = 1e-3
    """Weight decay, decoupled from the gradients as in AdamW."""
    num_warmup_steps: Count = 0
    """Steps over which the learning rate rises linearly from 0."""
    learning_rate_schedule: RateSchedule = "constant"
    """Whether the learning rate stays as it is after the warm-up, or falls along half a cosine to 0 at the run's
    end."""
    max_grad_norm: Positive | None = None
    """Gradients are clipped to this L2 norm over all of them; None for no clipping."""


class ScheduleSettings(TrainSection):
    """The course of a run, in epochs; local_batch_size is per process."""

    num_epochs: Count = 101
    """Passes over the users."""
    local_batch_size: Size = 128
    """Users of a batch on each process."""
    early_stopping_patience: PositiveInt | None = None
    """A run ends after so many full evaluations without a better validation NDCG@10; None trains all epochs."""
    random_seed: Count = 42
    """Seed of all random numbers."""
    deterministic: bool = False
    """Dropout masks do not depend on the number of processes, at some cost in speed."""
    enable_tf32: bool = False
    """Matrix products in TF32 on GPUs that have it."""


class FineTuningSettings(TrainSection):
    """Training on from another run."""

    initialize_from: str | None = None
    """A run's folder (its best checkpoint) or a checkpoint to start from; items and users are matched by their original
    ids."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by their names or beginnings of names, as
    ``("items.table", "sequence.encoder.blocks.0")``."""


class EvaluationSettings(TrainSection):
    """Evaluation. Every eval_interval steps a batch of users, and in epochs between full evaluations
    partial_eval_num_iters batches, are drawn anew by the seed and scored."""

    eval_batch_size: Size = 128
    """Users that are scored at a time on each process."""
    eval_user_max_batch_size: Size | None = None
    """Upper bound of eval_batch_size, as published; None for none."""
    eval_users: PositiveInt | None = None
    """Number of users of each full evaluation, drawn by the seed; None for all users."""
    eval_bf16: bool = False
    """The encoder's products in bfloat16 in evaluation alone, scores in float32; the published programs round states
    and items instead."""
    eval_interval: Period = 100
    """Steps from one evaluation of a batch of users to the next."""
    full_eval_every_n: Period = 1
    """Epochs from one evaluation of all users to the next."""
    partial_eval_num_iters: Annotated[PositiveInt, Unless("train_fn.full_eval_every_n", (1,))] = 32
    """Batches of users that are scored in epochs between full evaluations, other users in each."""
    seen_filter: str = "history"
    """Which items are no candidates because the user had them: a name of ``--list=seen_filters``."""
    list_metrics_k: Size | None = None
    """Length of the lists whose recall, MAP, novelty, coverage and diversity are reported; None for none."""
    rating_threshold: float = 4.0
    """Lowest rating that counts as high, in metrics of high-rated targets and in the loss by ratings."""


class CheckpointSettings(TrainSection):
    """Checkpoints: after epochs n, 2 n and so on, counted from 0 as published, and every so many minutes."""

    save_ckpt_every_n: Period = 1000
    """Epochs from one checkpoint to the next, counted from 0 as published, beside those by minutes and of best
    epochs."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints are kept, beside the best one."""
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
    """Batches that are prefetched, at most 64."""
    num_workers: Count = 0
    """Accepted without effect: batches are made by one thread, for which no step waits."""


class WeightedLossSettings(Section):
    """Weights of auxiliary losses, by their published function."""

    gin_name: ClassVar[str] = "get_weighted_loss"

    weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Weights of auxiliary losses by name, beside ``train_fn.loss_weights``."""


class SimilaritySettings(Section):
    """Switches that go before the options of a similarity that has them."""

    gin_name: ClassVar[str] = "get_similarity_function"

    bf16_training: Annotated[bool, OptionOf("similarities")] = False
    """A mixture of logits multiplies in bfloat16, in evaluation too, as ``train_fn.main_module_bf16`` has it do; False
    leaves the similarity's own option."""
    activation_checkpoint: Annotated[bool, OptionOf("similarities")] = False
    """A mixture of logits computes its activations again in the backward pass; False leaves its own option."""
