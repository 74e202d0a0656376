"""Sequential recommendation: raw ratings in, trained next-item retrievers and honest numbers out.

The names below are where most programs start; each package exports the rest of what it offers. They are read on first
use, so importing the package costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors do not read `lazy_exports`
    from generative_recommenders.build.factories import (
        create_mol_interaction_module,
        get_input_preprocessor,
        get_negatives_sampler,
        get_output_postprocessor,
        get_sequential_encoder,
        get_similarity_function,
    )
    from generative_recommenders.build.parts import build_model
    from generative_recommenders.checkpoint.weights import load_model
    from generative_recommenders.commands.train import train
    from generative_recommenders.config.registry import (
        register_data_source,
        register_encoder,
        register_input_preprocessor,
        register_item_embedding,
        register_loss,
        register_negative_sampler,
        register_objective,
        register_optimizer,
        register_output_postprocessor,
        register_seen_filter,
        register_similarity,
        register_top_k,
    )
    from generative_recommenders.config.schema import RunSettings
    from generative_recommenders.data.preparation.prepare import prepare
    from generative_recommenders.data.splits import make_split
    from generative_recommenders.data.store import SequenceDataset
    from generative_recommenders.errors import UserError
    from generative_recommenders.evaluation.evaluator import Evaluator
    from generative_recommenders.modeling.encoders.hstu import HSTU
    from generative_recommenders.modeling.encoders.sasrec import SASRec
    from generative_recommenders.modeling.model import (
        SequenceEncoder,
        SequenceRecommender,
    )
    from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
    from generative_recommenders.retrieval.recommender import Recommender
    from generative_recommenders.types import SequentialFeatures

__version__ = "0.2.0"


def lazy_exports(package: str, exports: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A module ``__getattr__`` (PEP 562) that reads each exported name from its module on first use.

    exports: module below the package -> the names it is asked for.
    """
    module_of = {name: module for module, names in exports.items() for name in names}

    def read(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return read


__all__ = [
    "HSTU",
    "DotProductSimilarity",
    "Evaluator",
    "Recommender",
    "RunSettings",
    "SASRec",
    "SequenceDataset",
    "SequenceEncoder",
    "SequenceRecommender",
    "SequentialFeatures",
    "UserError",
    "__version__",
    "build_model",
    "create_mol_interaction_module",
    "get_input_preprocessor",
    "get_negatives_sampler",
    "get_output_postprocessor",
    "get_sequential_encoder",
    "get_similarity_function",
    "load_model",
    "make_split",
    "prepare",
    "register_data_source",
    "register_encoder",
    "register_input_preprocessor",
    "register_item_embedding",
    "register_loss",
    "register_negative_sampler",
    "register_objective",
    "register_optimizer",
    "register_output_postprocessor",
    "register_seen_filter",
    "register_similarity",
    "register_top_k",
    "train",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "build.factories": [name for name in __all__ if name.startswith(("get_", "create_"))],
        "build.parts": ["build_model"],
        "commands.train": ["train"],
        "config.registry": [name for name in __all__ if name.startswith("register_")],
        "config.schema": ["RunSettings"],
        "data.preparation.prepare": ["prepare"],
        "data.splits": ["make_split"],
        "data.store": ["SequenceDataset"],
        "errors": ["UserError"],
        "evaluation.evaluator": ["Evaluator"],
        "modeling.encoders.hstu": ["HSTU"],
        "modeling.encoders.sasrec": ["SASRec"],
        "modeling.model": ["SequenceEncoder", "SequenceRecommender"],
        "modeling.similarity.dot_product": ["DotProductSimilarity"],
        "checkpoint.weights": ["load_model"],
        "retrieval.recommender": ["Recommender"],
        "types": ["SequentialFeatures"],
    },
)
