"""Construction of a run's parts from its settings, and of single parts by their names."""

from __future__ import annotations

from generative_recommenders import lazy_exports

__all__ = [
    "CombinedItemAndRatingInputFeaturesPreprocessor",
    "InBatchNegativesSampler",
    "L2NormEmbeddingPostprocessor",
    "LayerNormEmbeddingPostprocessor",
    "LearnablePositionalEmbeddingInputFeaturesPreprocessor",
    "LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor",
    "LocalNegativesSampler",
    "build_criterion",
    "build_model",
    "build_objective",
    "build_sampler",
    "build_task",
    "create_mol_interaction_module",
    "get_input_preprocessor",
    "get_negatives_sampler",
    "get_output_postprocessor",
    "get_sequential_encoder",
    "get_similarity_function",
]

__getattr__ = lazy_exports(
    "generative_recommenders",
    {
        "build.parts": [name for name in __all__ if name.startswith("build_")],
        "build.factories": [name for name in __all__ if name.startswith(("get_", "create_"))],
        "modeling.input_preprocessors": [name for name in __all__ if name.endswith("Preprocessor")],
        "modeling.output_postprocessors": [name for name in __all__ if name.endswith("Postprocessor")],
        "objectives.negative_samplers": [name for name in __all__ if name.endswith("Sampler")],
    },
)
