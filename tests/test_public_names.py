"""What the packages export, frozen: a name added, moved or dropped on purpose changes this file too."""

from __future__ import annotations

import enum
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "generative_recommenders"
ROOT = Path(__file__).parents[1]
PUBLIC = {
    "": """
        HSTU DotProductSimilarity Evaluator RunSettings SASRec SequenceDataset SequenceEncoder
        SequenceRecommender SequentialFeatures UserError __version__ build_model load_model make_split
        prepare
    """,
    "data": """
        PROTOCOLS Copy EqualityMask EvaluationLoader FeatureSpec Group LastTarget LoadedBatch Manifest
        MultiClassNegativeSampling NextToken RawRatings ReaderFormat Rename Select SequenceDataset
        SequenceLoader SequenceRoll SequenceRows Split SyntheticBooksSettings TokenMask Trim
        UniformNegativeSampling Unsqueeze default_sasrec_transforms default_two_tower_transforms
        export_parquet export_text import_text known_datasets make_split prefetch prepare prepare_with_spark
        prepared_path resolve write_synthetic_books
    """,
    "modeling": """
        CategoricalEmbedding CategoricalEmbeddingModule CombinedItemAndRatingInputFeaturesPreprocessor
        ConcatAggregator DefaultAttentionMask DiffTransformerBlock DiffTransformerLayer EmbeddingSpec
        HistoryCache IdentityEmbedding InputPreprocessor ItemEmbedding ItemRows L2NormEmbeddingPostprocessor
        LayerNormEmbeddingPostprocessor Layout LearnablePositionalEmbeddingInputFeaturesPreprocessor
        LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor LocalEmbeddingModule MultiHeadAttention
        MultiHeadDifferentialAttention NumericalEmbedding PointWiseFeedForward PositionAwareAggregator
        PositionalEncoding SasRecTransformerLayer SequenceEmbedding SequenceEncoder SequenceRecommender
        SumAggregator SwiGLU SwiGLUEncoder TransformerEncoder Visibility jagged_layout padded_layout
    """,
    "modeling.encoders": """
        HSTU DiffTransformer EntityFeature FeatureMerger ItemTower ItemTowerEmbedding SASRec Transformer
    """,
    "modeling.similarity": """
        AuxiliaryLosses DotProductSimilarity ItemComponents MoLSettings MoLSimilarity QueryComponents
        Similarity
    """,
    "objectives": """
        BCE CATALOGUE_LOSSES CE SAMPLED_LOSSES BCELoss BCELossWithRatings BCESampled CESampled CEWeighted
        CatalogueCriterion CatalogueLoss CausalObjective Criterion GBCELoss
        InBatchNegativesSampler LearnedScorer LocalNegativesSampler LogInCE LogInCESampled LogOutCE
        LogOutCESampled LossOutput MaskEmbedding MaskedItemMasking MaskedObjective MaskedSequence
        MaskingScheme MixedNegativesSampler MultiClassNegativesSampler Negatives NegativesSampler
        PermutationMasking PopularityNegativesSampler ProductScorer ReplacedDetectionCriterion
        SCEParams SampledCriterion SampledLoss SampledScores SampledSoftmaxLoss
        ScalableCrossEntropyLoss Scorer TrainingExample
    """,
    "indexing": """
        BruteForceTopK MIPSBruteForceTopK MoLAvgTopK MoLBruteForceTopK MoLCombTopK MoLNaiveTopK make_top_k
    """,
    "evaluation": """
        CUTOFFS AvgPrecisionAt Collectives DCGAt EvaluationResult Evaluator ListMetrics MarkovSuccessor
        MeanRecipricolRankAt MeanReciprocalRankAt MostPopular NDCGAt NotComparableWarning PrecisionAt
        RankHistogram RankingMetric RecallAt RecommendationMetrics coverage exact_ranks popularity_bias
        sampled_candidate_metrics
    """,
    "training": """
        Catalogue Checkpoint CheckpointStore LazyAdamW ModelEvaluation Optimizer RowwiseAdagrad RunFolder
        RunSettings TrainResult TrainSettings Trainer TrainingStep build_criterion build_inference
        build_model build_objective build_sampler build_top_k load_meta_checkpoint load_model
    """,
    "compat": """
        BCE CE AttentionVisualization AvgPrecisionAt BCESampled CESampled CEWeighted
        CategoricalEmbedding CausalLanguageModeling ConcatAggregator ContrastiveLoss CopyTransform DCGAt
        DefaultAttentionMask DiffTransformerBlock DiffTransformerLayer EmbeddingTyingHead
        EqualityMaskTransform FeatureHint FeatureSource FeatureType FeaturesReader GroupTransform
        IdentityEmbedding InferenceOutput ItemTower LogInCE LogInCESampled LogOutCE LogOutCESampled
        MaskSequence MaskedLanguageModeling MaskingInfo MeanRecipricolRankAt MeanReciprocalRankAt
        ModelUtils MultiClassNegativeSamplingTransform MultiHeadAttention MultiHeadDifferentialAttention
        NDCGAt NextItemModel NextTokenTransform NumericalEmbedding PermutationLanguageModeling
        PointWiseFeedForward PositionAwareAggregator PositionalEncoding PostprocessorBase PrecisionAt
        QueryTower RankingMetric RecallAt RecommendationMetrics RenameTransform
        ReplacementLanguageModeling SCEParams SasRec SasRecBody SasRecTransformerLayer
        ScalableCrossEntropyLoss SeenItemsFilter SelectTransform SequenceEmbedding SequenceLoss
        SequenceRollTransform SumAggregator SwiGLU SwiGLUEncoder TensorFeatureInfo TensorFeatureSource
        TensorSchema TokenMaskTransform TrainOutput TransformerEncoder TrimTransform TwoTower
        TwoTowerBody UniformNegativeSamplingTransform UnsqueezeTransform VQVAELoss
        make_default_sasrec_transforms make_default_twotower_transforms
    """,
}
BUILDING_BLOCKS = {
    "modeling": """
        CategoricalEmbedding CategoricalEmbeddingModule ConcatAggregator DefaultAttentionMask
        DiffTransformerBlock DiffTransformerLayer IdentityEmbedding LocalEmbeddingModule
        MultiHeadAttention MultiHeadDifferentialAttention NumericalEmbedding PointWiseFeedForward
        PositionAwareAggregator PositionalEncoding SasRecTransformerLayer SequenceEmbedding SumAggregator
        SwiGLU SwiGLUEncoder TransformerEncoder
    """,
    "compat": """
        CategoricalEmbedding ConcatAggregator DefaultAttentionMask DiffTransformerBlock DiffTransformerLayer
        EmbeddingTyingHead FeaturesReader IdentityEmbedding ItemTower MultiHeadDifferentialAttention
        NumericalEmbedding PointWiseFeedForward PositionAwareAggregator QueryTower SasRec SasRecBody
        SasRecTransformerLayer SequenceEmbedding SumAggregator SwiGLU SwiGLUEncoder TwoTower TwoTowerBody
    """,
}
"""Documented classes: our own signatures in ``modeling``, RePlay's in ``compat``."""


def package(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)


@pytest.mark.parametrize("name", PUBLIC)
def test_exports(name: str) -> None:
    module = package(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert set(module.__all__) == set(PUBLIC[name].split())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_export_is_there_and_ours(name: str) -> None:
    module = package(name)
    for exported in module.__all__:
        value = getattr(module, exported)
        if isinstance(value, type):
            assert value.__module__.startswith(PACKAGE), exported
            assert value.__doc__ or issubclass(value, enum.Enum), f"{exported} has no docstring"


def test_every_package_exports() -> None:
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT / PACKAGE).parts) for folder in folders}
    assert names == set(PUBLIC)


@pytest.mark.parametrize(("where", "names"), BUILDING_BLOCKS.items())
def test_building_blocks(where: str, names: str) -> None:
    assert set(names.split()) <= set(package(where).__all__)


def test_blocks_that_are_one_idea_are_one_class() -> None:
    both = set(package("modeling").__all__) & set(package("compat").__all__)
    assert {"SwiGLU", "DiffTransformerLayer", "PositionAwareAggregator"} <= both
    for name in both:
        assert issubclass(getattr(package("compat"), name), getattr(package("modeling"), name))


def test_the_package_is_imported_without_torch() -> None:
    code = f"import sys, {PACKAGE} as g; print('torch' in sys.modules, g.UserError.__name__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "UserError", "True"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_name_that_does_not_exist(name: str) -> None:
    with pytest.raises(AttributeError, match="Sasrek"):
        _ = package(name).Sasrek


def test_modules_are_still_imported_by_name() -> None:
    from generative_recommenders.evaluation import metrics
    from generative_recommenders.training import launch

    assert isinstance(metrics, ModuleType)
    assert isinstance(launch, ModuleType)


def test_the_version_is_that_of_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"', text, re.MULTILINE).group(1) == package("").__version__
