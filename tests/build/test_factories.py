"""Factories of single parts: those that configurations name, with their options checked."""

from __future__ import annotations

import inspect

import pytest
import torch

import generative_recommenders as package
from generative_recommenders import build
from generative_recommenders.config.gin import load_settings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.hstu import HSTU
from generative_recommenders.modeling.encoders.sasrec import SASRec
from tiny_models import catalogue


def test_parts_by_their_names() -> None:
    encoder = package.get_sequential_encoder("HSTU", 8, 12, dqk=4, dv=4, activation_checkpoint=True)
    assert isinstance(encoder, HSTU) and encoder.activation_checkpoint and encoder.max_length == 12
    assert isinstance(package.get_sequential_encoder("TwoTower", 8, 12, query_module="SASRec"), SASRec)
    assert package.get_input_preprocessor("LearnablePositionalEmbedding", 12, 8).position.shape == (12, 8)
    postprocessor = package.get_output_postprocessor("l2_norm", 2)
    torch.testing.assert_close(postprocessor(torch.tensor([[3.0, 4.0, 9.0]])), torch.tensor([[0.6, 0.8]]))
    sampler = package.get_negatives_sampler("local", 5, 3)
    assert sampler(7, 0, 4).ids.shape == (4, 3)


def test_the_mixture_has_documented_options_and_switches() -> None:
    parameters = inspect.signature(package.create_mol_interaction_module).parameters
    assert {"dot_product_dimension", "gating_combination_type", "eps"} <= set(parameters)
    small = {"query_dot_product_groups": 2, "item_dot_product_groups": 2, "dot_product_dimension": 4}
    mixture = package.get_similarity_function("MoL", 8, 8, bf16_training=True, **small)
    assert mixture.bf16_training and not mixture.activation_checkpoint
    assert package.get_similarity_function("", 8, 8, bf16_training=True, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bf16_training": "yes"}, "create_mol_interaction_module.bf16_training must be of type bool, got 'yes'"),
        ({"score_dtype": torch.bfloat16}, "create_mol_interaction_module has no parameter 'score_dtype'"),
        ({"module_type": "DotProduct"}, "create_mol_interaction_module has no parameter 'module_type'"),
    ],
)
def test_the_mixtures_own_factory_checks_its_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        package.create_mol_interaction_module(8, 8, **options)


def test_the_package_of_builders_has_the_names_that_it_exports() -> None:
    for name in build.__all__:
        assert getattr(build, name).__name__ == name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SASRek", {}, "unknown encoder 'SASRek'.*did you mean 'SASRec'"),
        ("SASRec", {"num_blocks": 0}, "sasrec_encoder.num_blocks must be 1 or more, got 0"),
        (
            "SASRec",
            {"num_block": 1},
            "sasrec_encoder has no parameter 'num_block'; did you mean 'num_blocks'",
        ),
        ("TwoTower", {"query_module": "TwoTower"}, "has a query tower itself"),
        ("TwoTower", {"query_module": "SASRek"}, r"unknown encoder 'SASRek' \(item_tower.query_module\)"),
    ],
)
def test_what_cannot_be_reports_one_line_error(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        package.get_sequential_encoder(name, 8, 12, **options)


def test_a_run_is_built_through_them() -> None:
    """Names that published configurations bind on the factories reach the model."""
    chosen = load_settings([], [
        "train_fn.interaction_module_type = 'MoL'", "train_fn.item_embedding_dim = 8",
        "train_fn.main_module = 'HSTU'", "get_sequential_encoder.activation_checkpoint = True",
        "get_similarity_function.activation_checkpoint = True", "create_mol_interaction_module.eps = 1e-5",
        "create_mol_interaction_module.dot_product_dimension = 4",
    ])  # fmt: skip
    model = package.build_model(chosen, catalogue())
    assert model.sequence.encoder.activation_checkpoint
    assert model.similarity.activation_checkpoint and model.similarity.eps == 1e-5
