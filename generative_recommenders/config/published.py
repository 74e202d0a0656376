"""Published names that fill an option of the chosen part, and those that something else takes the place of.

The option, with its type, range and default, stands in the part's constructor. The published name stays its canonical
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from generative_recommenders.config.fields import range_of, type_name
from generative_recommenders.config.registry import (
    ENCODERS,
    INPUT_PREPROCESSORS,
    ITEM_EMBEDDINGS,
    LOSSES,
    NEGATIVE_SAMPLERS,
    OBJECTIVES,
    OUTPUT_POSTPROCESSORS,
    SIMILARITIES,
    Part,
    Registry,
)


@dataclass(frozen=True)
class Target:
    """An option that a published name fills, in each part of the registry that has it.

    only: gin name of the one part that is filled, instead of what fills its kind. default: of the published programs,
    where it is not the part's own. required: the choice changes what is learned, and is refused where the part has no
    such option; others are said to have no effect.
    """

    registry: Registry
    option: str
    only: str | None = None
    default: Any = None
    required: bool = False

    def default_of(self, part: Part) -> Any:
        """The default of a run with the part."""
        return part.default(self.option) if self.default is None else self.default


PUBLISHED: dict[str, tuple[Target, ...]] = {
    "train_fn.dropout_rate": (Target(INPUT_PREPROCESSORS, "dropout_rate"),),
    "train_fn.rating_embedding_dim": (Target(INPUT_PREPROCESSORS, "rating_embedding_dim"),),
    "train_fn.num_ratings": (Target(INPUT_PREPROCESSORS, "num_ratings"),),
    "train_fn.next_time": (Target(ENCODERS, "next_time"),),
    "get_sequential_encoder.activation_checkpoint": (Target(ENCODERS, "activation_checkpoint"),),
    "item_tower.query_module": (Target(ENCODERS, "query_module", only="two_tower"),),
    "train_fn.item_l2_norm": (Target(ITEM_EMBEDDINGS, "item_l2_norm"),),
    "train_fn.l2_norm_eps": (
        Target(ITEM_EMBEDDINGS, "l2_norm_eps"),
        Target(OUTPUT_POSTPROCESSORS, "eps"),
    ),
    "train_fn.temperature": (
        Target(SIMILARITIES, "temperature", default=0.05),
        Target(SIMILARITIES, "score_temperature", only="create_mol_interaction_module", default=0.05),
    ),
    "train_fn.label_smoothing": (Target(LOSSES, "label_smoothing", required=True),),
    "train_fn.calibration": (Target(LOSSES, "calibration"),),
    "train_fn.rating_threshold": (Target(LOSSES, "threshold"),),
    "train_fn.num_positives": (Target(OBJECTIVES, "num_positives", required=True),),
    "train_fn.target_weights": (Target(OBJECTIVES, "target_weights", required=True),),
    "train_fn.mask_probability": (Target(OBJECTIVES, "mask_probability"),),
    "train_fn.max_span_length": (Target(OBJECTIVES, "max_span_length"),),
    "train_fn.permute_all": (Target(OBJECTIVES, "permute_all"),),
    "train_fn.fakes_from": (Target(OBJECTIVES, "fakes_from"),),
    "train_fn.tie_discriminator": (Target(OBJECTIVES, "tie_discriminator"),),
    "train_fn.discriminator_weight": (Target(OBJECTIVES, "discriminator_weight"),),
    "train_fn.log_q_correction": (Target(NEGATIVE_SAMPLERS, "log_q_correction", required=True),),
    "train_fn.popularity_power": (Target(NEGATIVE_SAMPLERS, "power"),),
    "train_fn.mixed_shares": (Target(NEGATIVE_SAMPLERS, "shares"),),
    "train_fn.class_selector": (Target(NEGATIVE_SAMPLERS, "selector"),),
}
"""Published name -> what it fills. ``train_fn.rating_threshold`` is a setting of the evaluation too."""

ELSEWHERE = {
    "train_fn.restore_from_ckpt": "give --resume --run_dir=RUN, or --mode=import --meta_checkpoint=FILE for a "
    "checkpoint of the authors' program",
    "train_fn.rank": "processes are numbered by the launcher: give --num_processes, torchrun or srun",
    "train_fn.world_size": "give --num_processes, torchrun or srun",
    "train_fn.master_port": "give --master_port",
    "get_sequential_encoder.module_type": "bind train_fn.main_module",
    "get_sequential_encoder.max_sequence_length": "bind train_fn.max_sequence_length",
    "get_sequential_encoder.max_output_length": "bind train_fn.gr_output_length, which is one less",
    "get_sequential_encoder.embedding_module": "bind train_fn.embedding_module_type",
    "get_sequential_encoder.interaction_module": "bind train_fn.interaction_module_type",
    "get_sequential_encoder.input_preproc_module": "bind train_fn.input_preprocessor",
    "get_sequential_encoder.output_postproc_module": "bind train_fn.user_embedding_norm",
    "get_sequential_encoder.verbose": "--dry_run prints the model",
    "get_similarity_function.module_type": "bind train_fn.interaction_module_type",
    "get_similarity_function.query_embedding_dim": "bind train_fn.item_embedding_dim",
    "get_similarity_function.item_embedding_dim": "bind train_fn.item_embedding_dim",
    "create_mol_interaction_module.query_embedding_dim": "bind train_fn.item_embedding_dim",
    "create_mol_interaction_module.item_embedding_dim": "bind train_fn.item_embedding_dim",
    "create_data_loader.batch_size": "bind train_fn.local_batch_size and train_fn.eval_batch_size",
    "create_data_loader.shuffle": "training batches are shuffled by train_fn.random_seed, those of evaluation are not",
    "create_data_loader.world_size": "give --num_processes, torchrun or srun",
    "create_data_loader.rank": "processes are numbered by the launcher: give --num_processes, torchrun or srun",
    "create_data_loader.drop_last": "no batch is dropped",
}
"""Parameters of the HSTU authors' functions that are no settings here -> what to do instead. None, "" and False, which
ask for nothing, are accepted."""


def targets_in(part: Part) -> dict[str, Target]:
    """Published name -> target, of the options that the part has; a target of this part alone goes before those of its
    kind."""
    every = ((name, target) for name, targets in PUBLISHED.items() for target in targets)
    of_kind = [(name, target) for name, target in every if target.registry is part.registry]
    own = {name: target for name, target in of_kind if target.only == part.gin_name}
    found = own or {name: target for name, target in of_kind if target.only is None}
    return {name: target for name, target in found.items() if target.option in part.options.model_fields}


def describe(registry: Registry) -> list[str]:
    """A line a part, for ``--list``: its options with types, the defaults of a run, ranges, and the published names
    that fill them."""
    lines = []
    for part in registry.parts():
        filled = {target.option: (name, target) for name, target in targets_in(part).items()}
        options = []
        for option, field in part.options.model_fields.items():
            name, target = filled.get(option, ("", None))
            default = part.default(option) if target is None else target.default_of(part)
            text = f"{option}: {type_name(field.annotation)}" + ("" if default is ... else f" = {default!r}")
            limits = range_of(field)
            options.append(text + (f" ({limits})" if limits else "") + (f", by {name}" if name else ""))
        origin = f" [{part.plugin.source}]" if part.plugin else ""
        lines.append(f"{part.name} ({part.gin_name}){origin}: {'; '.join(options) or 'no options'}")
    return lines
