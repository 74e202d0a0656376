"""Settings, what is built from them, and the loop. Names are read from their modules on first use."""

from .. import lazy_exports

__all__ = [
    "Catalogue",
    "Checkpoint",
    "CheckpointStore",
    "LazyAdamW",
    "ModelEvaluation",
    "Optimizer",
    "RowwiseAdagrad",
    "RunFolder",
    "RunSettings",
    "TrainResult",
    "TrainSettings",
    "Trainer",
    "TrainingStep",
    "build_criterion",
    "build_inference",
    "build_model",
    "build_objective",
    "build_sampler",
    "build_top_k",
    "load_meta_checkpoint",
    "load_model",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "assembly": [
            "build_criterion",
            "build_inference",
            "build_model",
            "build_objective",
            "build_sampler",
            "build_top_k",
        ],
        "catalogue": ["Catalogue"],
        "checkpoint": ["Checkpoint", "CheckpointStore"],
        "meta_checkpoint": ["load_meta_checkpoint"],
        "model_evaluation": ["ModelEvaluation"],
        "optimizers": ["LazyAdamW", "Optimizer", "RowwiseAdagrad"],
        "run_folder": ["RunFolder"],
        "settings": ["RunSettings", "TrainSettings"],
        "step": ["TrainingStep"],
        "train": ["TrainResult", "Trainer", "load_model"],
    },
)
