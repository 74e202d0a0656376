"""Settings of a run as closed dataclasses that go to JSON and back. The defaults are those of the published programs.

The gin names of `gin_registry` are these classes; a checkpoint is rebuilt from their JSON form alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from absl import logging

from generative_recommenders.config.checks import (
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
    check_types,
    check_weights,
)
from generative_recommenders.config.registry import (
    ENCODERS,
    INPUT_PREPROCESSORS,
    ITEM_EMBEDDINGS,
    LOSSES,
    NEGATIVE_SAMPLERS,
    OUTPUT_POSTPROCESSORS,
    REGISTRIES,
    SIMILARITIES,
    Registry,
    parts_by_gin_name,
)
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSettings
from generative_recommenders.objectives.negative_samplers import SHARINGS

PROTOCOLS = ("leave_one_out", "paper", "global_time")
SEEN_FILTERS = ("history", "window", "none")
NEXT_TIMES = ("given", "hidden")
FAKES_FROM = ("batch", "catalogue")
TARGET_WEIGHTS = ("equal", "rating")
CLASS_SELECTORS = ("random", "target")
LIST_REDUCTIONS = ("sum", "mean", "max")
MAX_PREFETCH = 64
"""Batches that a loader makes ahead at most."""
MAX_PARTS = 1000
"""Blocks or heads at most: what builds more takes the memory, and means something else."""
_POSITIVE_IF_GIVEN = (
    "eval_user_max_batch_size", "list_metrics_k", "max_grad_norm", "early_stopping_patience",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """``train_fn``: the run. Times are in steps or epochs as named; sizes are per process.

    learning_rate is that of the global batch: local_batch_size rows on each process, one mean loss over all of them.
    It is never scaled by the number of processes, so N processes of b rows train as one process of N * b.

    num_positives: a position predicts the next so many events (PinnerFormer, arXiv 2205.04507). target_weights: what a
    target counts, the same or its rating. class_selector: whose class "multi-class" negatives come from, one at random or
    the target's. event_features: event columns that histories are read with.
    mask_probability: 0.15, permuted 1 / 6, unless given.
    """

    dataset_name: str = "synthetic-books"
    max_sequence_length: int = 200
    positional_sampling_ratio: float = 1.0
    local_batch_size: int = 128
    eval_batch_size: int = 128
    eval_user_max_batch_size: int | None = None
    main_module: str = "SASRec"
    main_module_bf16: bool = False
    dropout_rate: float = 0.2
    user_embedding_norm: str = "l2_norm"
    sampling_strategy: str = "in-batch"
    num_negatives: int = 1
    loss_module: str = "SampledSoftmaxLoss"
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_activation_checkpoint: bool = False
    temperature: float = 0.05
    item_l2_norm: bool = False
    l2_norm_eps: float = 1e-6
    num_epochs: int = 101
    learning_rate: float = 1e-3
    num_warmup_steps: int = 0
    weight_decay: float = 1e-3
    interaction_module_type: str = "DotProduct"
    top_k_method: str = "MIPSBruteForceTopK"
    embedding_module_type: str = "local"
    item_embedding_dim: int = 240
    gr_output_length: int = 10
    eval_interval: int = 100
    full_eval_every_n: int = 1
    partial_eval_num_iters: int = 32
    save_ckpt_every_n: int = 1000
    enable_tf32: bool = False
    eval_bf16: bool = False
    random_seed: int = 42
    # Ours, beside the published names.
    protocol: str = "leave_one_out"
    objective: str = "causal"
    negatives_sharing: str = "position"
    negatives_block_size: int = 256
    log_q_correction: bool = False
    popularity_power: float = 0.75
    mixed_shares: dict[str, float] = field(default_factory=lambda: {"local": 0.5, "popularity": 0.5})
    class_feature: str | None = None
    class_selector: str = "random"
    num_positives: int = 1
    target_weights: str = "equal"
    seen_filter: str = "history"
    input_preprocessor: str = "LearnablePositionalEmbedding"
    rating_embedding_dim: int = 8
    num_ratings: int = 6
    category_feature: str | None = None
    optimizer: str = "adamw"
    max_grad_norm: float | None = None
    next_time: str = "given"
    event_features: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    calibration: float = 0.75
    mask_probability: float | None = None
    max_span_length: int = 5
    permute_all: bool = False
    fakes_from: str = "batch"
    tie_discriminator: bool = False
    discriminator_weight: float = 50.0
    rating_threshold: float = 4.0
    list_metrics_k: int | None = None
    keep_checkpoints: int = 3
    checkpoint_minutes: float = 15.0
    early_stopping_patience: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "event_features",
            tuple(self.event_features) if isinstance(self.event_features, list) else self.event_features,
        )
        check_types(self, "train_fn")
        check_positive(
            self, "max_sequence_length", "local_batch_size", "eval_batch_size", "item_embedding_dim"
        )
        check_positive(
            self,
            "num_negatives",
            "eval_interval",
            "full_eval_every_n",
            "partial_eval_num_iters",
            "save_ckpt_every_n",
            "temperature",
        )
        check_positive(
            self,
            "negatives_block_size",
            "rating_embedding_dim",
            "learning_rate",
            "keep_checkpoints",
            "checkpoint_minutes",
            "l2_norm_eps",
            "num_ratings",
            "num_positives",
        )
        check_positive(self, *(name for name in _POSITIVE_IF_GIVEN if getattr(self, name) is not None))
        check_not_negative(self, "num_epochs", "gr_output_length", "num_warmup_steps", "random_seed")
        check_not_negative(self, "weight_decay", "discriminator_weight")
        check_share(self, "dropout_rate", "label_smoothing")
        check_weights(self, "loss_weights")
        check_weights(self, "mixed_shares")
        check_choice(self, "protocol", PROTOCOLS)
        check_choice(self, "negatives_sharing", SHARINGS)
        check_choice(self, "target_weights", TARGET_WEIGHTS)
        check_choice(self, "class_selector", CLASS_SELECTORS)
        check_choice(self, "seen_filter", SEEN_FILTERS)
        check_choice(self, "next_time", NEXT_TIMES)
        check_choice(self, "fakes_from", FAKES_FROM)
        if not 0.0 < self.positional_sampling_ratio <= 1.0:
            raise UserError(
                f"train_fn.positional_sampling_ratio must be in (0, 1], got {self.positional_sampling_ratio}"
            )
        if self.early_stopping_patience is not None and self.protocol == "paper":
            raise UserError(
                'train_fn.early_stopping_patience needs validation targets, and protocol "paper" has none: unset it'
            )

    @property
    def max_tokens(self) -> int:
        """Rows of the position table: max_sequence_length + gr_output_length + 1, HSTU's constant divisor."""
        return self.max_sequence_length + self.gr_output_length + 1


@dataclass(frozen=True)
class SasrecSettings:
    """``sasrec_encoder``. norm_weights and final_norm give RePlay's form of the layer."""

    num_blocks: int = 2
    num_heads: int = 1
    ffn_hidden_dim: int = 64
    ffn_activation_fn: str = "relu"
    ffn_dropout_rate: float = 0.2
    norm_weights: bool = False
    final_norm: bool = False


@dataclass(frozen=True)
class HstuSettings:
    """``hstu_encoder``. dqk, dv: width of a head's queries and keys, and of its values; they may differ."""

    num_blocks: int = 2
    num_heads: int = 1
    dqk: int = 64
    dv: int = 64
    linear_dropout_rate: float = 0.0
    attn_dropout_rate: float = 0.0
    normalization: str = "rel_bias"
    linear_config: str = "uvqk"
    linear_activation: str = "silu"
    concat_ua: bool = False
    enable_relative_attention_bias: bool = True
    enable_relative_time_bias: bool = True


@dataclass(frozen=True)
class DiffTransformerSettings:
    """``diff_transformer_encoder``. norm: "pre" (the paper) or "post" (RePlay)."""

    num_blocks: int = 2
    num_heads: int = 1
    norm: str = "post"
    dropout_rate: float = 0.0


@dataclass(frozen=True)
class TransformerSettings:
    """``transformer_encoder``: plain post-norm blocks with sinusoidal positions."""

    num_blocks: int = 2
    num_heads: int = 1
    ffn_hidden_dim: int = 64
    dropout_rate: float = 0.1


@dataclass(frozen=True)
class ItemTowerSettings:
    """``item_tower``, for ``embedding_module_type = "item_tower"`` and ``main_module = "TwoTower"``.

    features: of the prepared items table, by name; "item_id" is the id itself. list_reduction: "sum", "mean"
    or "max" of a list's categories, of items and users. query_module: the encoder of TwoTower. query_features: of the users
    table, merged into its states.
    """

    features: tuple[str, ...] = ("item_id",)
    list_reduction: str = "mean"
    num_blocks: int = 1
    query_module: str = "SASRec"
    query_features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self, "list_reduction", LIST_REDUCTIONS, "item_tower")
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "query_features", tuple(self.query_features))


@dataclass(frozen=True)
class SceSettings:
    """``sce``, the sizes of ScalableCrossEntropyLoss; see `objectives.scalable_cross_entropy.SCEParams`."""

    n_buckets: int = 256
    bucket_size_x: int = 256
    bucket_size_y: int = 256
    mix_x: bool = False


@dataclass(frozen=True)
class EncoderSettings:
    """``get_sequential_encoder``."""

    activation_checkpoint: bool = False


@dataclass(frozen=True)
class LoaderSettings:
    """``create_data_loader``. Batches are cut by one thread, prefetch_factor ahead (at most 64)."""

    prefetch_factor: int = 2
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_types(self, "create_data_loader")
        check_not_negative(self, "prefetch_factor", "num_workers", owner="create_data_loader")


@dataclass(frozen=True)
class WeightedLossSettings:
    """``get_weighted_loss``: weights of auxiliary losses, beside ``train_fn.loss_weights``."""

    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "get_weighted_loss")
        check_weights(self, "weights", "get_weighted_loss")


@dataclass(frozen=True)
class SimilaritySettings:
    """``get_similarity_function``."""

    bf16_training: bool = False


@dataclass(frozen=True)
class RunSettings:
    """All of a run's choices."""

    train: TrainSettings = field(default_factory=TrainSettings)
    sasrec: SasrecSettings = field(default_factory=SasrecSettings)
    hstu: HstuSettings = field(default_factory=HstuSettings)
    diff_transformer: DiffTransformerSettings = field(default_factory=DiffTransformerSettings)
    transformer: TransformerSettings = field(default_factory=TransformerSettings)
    item_tower: ItemTowerSettings = field(default_factory=ItemTowerSettings)
    sce: SceSettings = field(default_factory=SceSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    weighted_loss: WeightedLossSettings = field(default_factory=WeightedLossSettings)
    similarity: SimilaritySettings = field(default_factory=SimilaritySettings)
    mol: MoLSettings = field(default_factory=MoLSettings)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of further parts, plug-ins among them, by gin name; what is not given has its default."""

    def part_options(self, registry: Registry, name: str) -> dict[str, Any]:
        """What a part is given: its own options, and those that published names fill where its own are not given."""
        part = registry[name]
        own = dict(self.options.get(part.gin_name, {}))
        if part.gin_name in SECTIONS:
            section = vars(getattr(self, SECTIONS[part.gin_name][0]))
            own = {**{k: v for k, v in section.items() if k in part.options.model_fields}, **own}
        for option, published in PUBLISHED_OPTIONS.get(registry.kind, {}).items():
            if option in part.options.model_fields:
                own.setdefault(option, self.published(published))
        return own

    def published(self, gin_name: str) -> Any:
        """The value of a published name, as ``train_fn.label_smoothing``."""
        owner, _, name = gin_name.partition(".")
        return getattr(getattr(self, SECTIONS[owner][0]), name)

    def chosen_parts(self) -> list[tuple[Registry, str]]:
        """The parts of this run that come from registries."""
        t, tower = self.train, self.train.main_module == "TwoTower"
        chosen = [
            (ENCODERS, self.item_tower.query_module if tower else t.main_module),
            (LOSSES, t.loss_module),
            (INPUT_PREPROCESSORS, t.input_preprocessor),
            (OUTPUT_POSTPROCESSORS, t.user_embedding_norm),
            (ITEM_EMBEDDINGS, "item_tower" if tower else t.embedding_module_type),
            (SIMILARITIES, t.interaction_module_type or "DotProduct"),
            (NEGATIVE_SAMPLERS, t.sampling_strategy),
        ]
        shares = (
            self.part_options(*chosen[-1]).get("shares", {}) if chosen[-1][1] in NEGATIVE_SAMPLERS else {}
        )
        return chosen + [(NEGATIVE_SAMPLERS, name) for name in shares]

    def plugin_parts(self) -> list[dict[str, Any]]:
        """What a checkpoint says of each part that comes from a plug-in."""
        found = []
        for registry, name in self.chosen_parts():
            plugin = registry[name].plugin if name in registry else None
            if plugin is not None:
                options = registry[name].option_values(self.part_options(registry, name))
                record = {"kind": registry.kind, "name": name, "options": options}
                found.append({**record, "plugin": plugin.source, "sha256": plugin.sha256})
        return found

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {**data, "plugins": self.plugin_parts()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunSettings:
        """From `to_json`'s form, which anybody may have written; UserError names a key that does not exist or a value
        that cannot be."""
        if not isinstance(data, dict):
            raise UserError(f"settings are no object but {str(data)[:40]!r}")
        data = dict(data)
        check_plugins(data.pop("plugins", []))
        options = _saved_options(data.pop("options", {}))
        sections = {f.name: f.default_factory for f in dataclasses.fields(cls) if f.name != "options"}
        unknown = sorted(set(data) - set(sections))
        if unknown:
            raise UserError(f"settings have unknown sections: {', '.join(unknown)[:200]}")
        try:
            read = {name: _section(sections[name], data.get(name, {}), name) for name in sections}
            return cls(**read, options=options)
        except UserError as error:
            raise UserError(str(error)[:300]) from error


def _saved_options(options: Any) -> dict[str, dict[str, Any]]:
    """Options by gin name, checked where the part is known."""
    if not isinstance(options, dict) or not all(isinstance(each, dict) for each in options.values()):
        raise UserError(f"settings section 'options' is no object of objects but {str(options)[:40]!r}")
    known = parts_by_gin_name()
    for name, values in options.items():
        if name in known:
            known[name].option_values(values)
    return options


def check_plugins(records: Any) -> None:
    """UserError naming the plug-in of a part that is not registered; a warning where the plug-in's file has changed.

    records: what `RunSettings.plugin_parts` wrote; nothing in them is imported.
    """
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise UserError(f"settings section 'plugins' is no list of objects but {str(records)[:40]!r}")
    registries = {registry.kind: registry for registry in REGISTRIES.values()}
    for record in records:
        kind, name, source = (str(record.get(key))[:200] for key in ("kind", "name", "plugin"))
        if kind not in registries or name not in registries[kind]:
            raise UserError(f"{kind} {name!r} comes from a plug-in: give --plugin={source}")
        plugin = registries[kind][name].plugin
        found = plugin.sha256 if plugin else None
        if found != record.get("sha256"):
            warn_changed_plugin(kind, name, source)


@cache
def warn_changed_plugin(kind: str, name: str, source: str) -> None:
    """Once for each part."""
    logging.warning("%s %r was saved with another version of %s than is loaded now", kind, name, source)


def _section(kind: Any, values: dict[str, Any], name: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"settings section {name!r} is no object but {str(values)[:40]!r}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"settings section {name!r} has unknown keys: {', '.join(unknown)}")
    try:
        section = kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in values.items()})
    except TypeError as error:
        raise UserError(f"settings section {name!r} has a value of the wrong type: {error}") from error
    check_section(section, name)
    return section


def check_section(settings: Any, owner: str) -> None:
    """UserError naming the first field that is not of its declared type, the first size that is not above 0, or the first
    dropout rate that is none."""
    check_types(settings, owner)
    for name in _SIZES.get(type(settings), ()):
        if getattr(settings, name) < 1:
            raise UserError(f"{owner}.{name} must be above 0, got {getattr(settings, name)}")
        if name in ("num_blocks", "num_heads") and getattr(settings, name) > MAX_PARTS:
            raise UserError(f"{owner}.{name} must be at most {MAX_PARTS}, got {getattr(settings, name)}")
    if not isinstance(settings, TrainSettings):
        check_share(
            settings, *(f.name for f in fields(settings) if f.name.endswith("dropout_rate")), owner=owner
        )


_SIZES: dict[type, tuple[str, ...]] = {
    SasrecSettings: ("num_blocks", "num_heads", "ffn_hidden_dim"),
    HstuSettings: ("num_blocks", "num_heads", "dqk", "dv"),
    DiffTransformerSettings: ("num_blocks", "num_heads"),
    TransformerSettings: ("num_blocks", "num_heads", "ffn_hidden_dim"),
    SceSettings: ("n_buckets", "bucket_size_x", "bucket_size_y"),
    MoLSettings: ("query_dot_product_groups", "item_dot_product_groups", "dot_product_dimension"),
}

SECTIONS: dict[str, tuple[str, type]] = {
    "train_fn": ("train", TrainSettings),
    "sasrec_encoder": ("sasrec", SasrecSettings),
    "hstu_encoder": ("hstu", HstuSettings),
    "diff_transformer_encoder": ("diff_transformer", DiffTransformerSettings),
    "transformer_encoder": ("transformer", TransformerSettings),
    "item_tower": ("item_tower", ItemTowerSettings),
    "sce": ("sce", SceSettings),
    "get_sequential_encoder": ("encoder", EncoderSettings),
    "create_data_loader": ("loader", LoaderSettings),
    "get_weighted_loss": ("weighted_loss", WeightedLossSettings),
    "get_similarity_function": ("similarity", SimilaritySettings),
    "create_mol_interaction_module": ("mol", MoLSettings),
}
"""gin name -> (section of `RunSettings`, its class)."""

PUBLISHED_OPTIONS: dict[str, dict[str, str]] = {
    "encoder": {
        "activation_checkpoint": "get_sequential_encoder.activation_checkpoint",
        "next_time": "train_fn.next_time",
    },
    "loss": {
        "label_smoothing": "train_fn.label_smoothing",
        "calibration": "train_fn.calibration",
        "threshold": "train_fn.rating_threshold",
    },
    "negative sampler": {
        "log_q_correction": "train_fn.log_q_correction",
        "power": "train_fn.popularity_power",
        "shares": "train_fn.mixed_shares",
        "selector": "train_fn.class_selector",
    },
    "input preprocessor": {
        "dropout_rate": "train_fn.dropout_rate",
        "rating_embedding_dim": "train_fn.rating_embedding_dim",
        "num_ratings": "train_fn.num_ratings",
    },
    "output postprocessor": {"eps": "train_fn.l2_norm_eps"},
    "item embedding": {"item_l2_norm": "train_fn.item_l2_norm", "l2_norm_eps": "train_fn.l2_norm_eps"},
    "similarity": {"temperature": "train_fn.temperature"},
}
"""Kind of part -> option -> the published name that fills it in the chosen part."""
