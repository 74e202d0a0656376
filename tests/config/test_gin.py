"""gin names: published ones are accepted, wrong ones are errors of one line, settings survive JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config.gin import differences, load_settings, override, resolved_text
from generative_recommenders.config.schema import FIELDS, RunSettings
from generative_recommenders.errors import UserError

ROOT = Path(__file__).parents[2]
register_built_in_parts()
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").glob("*/*.gin")
    if path.parent.name != "ablations"  # those are read by `generative_recommenders.ablate` alone
)
PUBLISHED = """
train_fn.dataset_name = "ml-1m"
train_fn.max_sequence_length = 200
train_fn.positional_sampling_ratio = 1.0
train_fn.local_batch_size = 128
train_fn.eval_batch_size = 128
train_fn.eval_user_max_batch_size = 64
train_fn.main_module = "HSTU"
train_fn.main_module_bf16 = False
train_fn.dropout_rate = 0.2
train_fn.user_embedding_norm = "l2_norm"
train_fn.item_embedding_dim = 50
train_fn.num_epochs = 101
train_fn.learning_rate = 1e-3
train_fn.weight_decay = 0
train_fn.num_warmup_steps = 0
train_fn.interaction_module_type = "MoL"
train_fn.top_k_method = "MoLBruteForceTopK"
train_fn.loss_module = "SampledSoftmaxLoss"
train_fn.loss_weights = {"mi_loss": 0.001}
train_fn.num_negatives = 128
train_fn.loss_activation_checkpoint = True
train_fn.sampling_strategy = "local"
train_fn.temperature = 0.05
train_fn.item_l2_norm = True
train_fn.l2_norm_eps = 1e-6
train_fn.enable_tf32 = True
train_fn.eval_interval = 100
train_fn.full_eval_every_n = 5
train_fn.partial_eval_num_iters = 64
train_fn.save_ckpt_every_n = 10
train_fn.embedding_module_type = "local"
train_fn.gr_output_length = 10
train_fn.random_seed = 42
train_fn.eval_bf16 = True
sasrec_encoder.num_blocks = 4
sasrec_encoder.num_heads = 2
sasrec_encoder.ffn_hidden_dim = 50
sasrec_encoder.ffn_activation_fn = "relu"
sasrec_encoder.ffn_dropout_rate = 0.2
hstu_encoder.num_blocks = 8
hstu_encoder.num_heads = 2
hstu_encoder.dqk = 25
hstu_encoder.dv = 25
hstu_encoder.linear_dropout_rate = 0.2
hstu_encoder.attn_dropout_rate = 0.1
hstu_encoder.normalization = "rel_bias"
hstu_encoder.linear_config = "uvqk"
hstu_encoder.linear_activation = "silu"
hstu_encoder.concat_ua = False
hstu_encoder.enable_relative_attention_bias = True
get_sequential_encoder.activation_checkpoint = True
create_data_loader.prefetch_factor = 128
create_data_loader.num_workers = 8
get_weighted_loss.weights = {"mi_loss": 0.001}
get_similarity_function.bf16_training = False
create_mol_interaction_module.query_dot_product_groups = 8
create_mol_interaction_module.item_dot_product_groups = 4
create_mol_interaction_module.dot_product_dimension = 64
create_mol_interaction_module.dot_product_l2_norm = True
create_mol_interaction_module.temperature = 0.05
create_mol_interaction_module.query_use_identity_fn = False
create_mol_interaction_module.item_use_identity_fn = True
create_mol_interaction_module.query_hidden_dim = 512
create_mol_interaction_module.query_dropout_rate = 0.2
create_mol_interaction_module.query_nonlinearity = "geglu"
create_mol_interaction_module.item_hidden_dim = -1
create_mol_interaction_module.item_dropout_rate = 0.0
create_mol_interaction_module.item_nonlinearity = "geglu"
create_mol_interaction_module.gating_query_hidden_dim = 128
create_mol_interaction_module.gating_query_fn = True
create_mol_interaction_module.gating_item_hidden_dim = 64
create_mol_interaction_module.gating_item_fn = True
create_mol_interaction_module.gating_item_dropout_rate = 0.0
create_mol_interaction_module.gating_qi_hidden_dim = 128
create_mol_interaction_module.gating_qi_dropout_rate = 0.0
create_mol_interaction_module.gating_combination_type = "glu_silu"
create_mol_interaction_module.softmax_dropout_rate = 0.2
create_mol_interaction_module.bf16_training = True
create_mol_interaction_module.uid_dropout_rate = 0.5
create_mol_interaction_module.uid_embedding_hash_sizes = [6040]
create_mol_interaction_module.uid_embedding_level_dropout = True
create_mol_interaction_module.uid_embedding_l2_weight_decay = 0.1
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "experiment.gin"
        path.write_text(text)
        return path

    return write


def message(files: list, bindings: list[str]) -> str:
    """The one line of the error that these give."""
    with pytest.raises(UserError) as caught:
        load_settings(files, bindings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_names_arrive(write) -> None:
    settings = load_settings([write(PUBLISHED)])
    resolved = resolved_text(settings)
    for line in PUBLISHED.strip().splitlines():
        name, _, text = line.partition(" = ")
        value = settings.value(name)
        expected = eval(text)
        assert (list(value) if isinstance(value, tuple) else value) == expected, name
        assert f"{name} =" in resolved or name.startswith("sasrec_encoder.")  # no part of this run


def test_resolved_configuration_is_complete_and_gives_the_same_settings(write) -> None:
    settings = load_settings([], ["train_fn.num_epochs = 3", "train_fn.mixed_shares = {'local': 1.0}"])
    resolved = resolved_text(settings)
    assert all(f"{name} =" in resolved for name in FIELDS)
    again = load_settings([write(resolved)])
    assert resolved_text(again) == resolved
    assert differences(settings, again) == []


def test_bindings_come_after_files_and_runs_do_not_mix(write) -> None:
    path = write("train_fn.num_epochs = 3\ntrain_fn.item_embedding_dim = 16")
    settings = load_settings([path], ["train_fn.num_epochs = 7"])
    assert (settings.schedule.num_epochs, settings.items.item_embedding_dim) == (7, 16)
    assert load_settings([], []) == RunSettings()


@pytest.mark.parametrize("config", CONFIGS)
def test_includes_are_found_from_any_directory(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    at_home = load_settings([config])
    monkeypatch.chdir(tmp_path)
    assert load_settings([ROOT / config]) == at_home != RunSettings()


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("train_fn.num_epoch = 3", ["train_fn", "'num_epoch'", "'num_epochs'"]),
        ("train_fn.lerning_rate = 3", ["'lerning_rate'", "'learning_rate'"]),
        ("trainfn.num_epochs = 3", ["'trainfn'", "'train_fn'"]),
        ("hstu.num_heads = 3", ["'hstu'", "'hstu_encoder'"]),
        ("create_mol_interaction_module.querry_hidden_dim = 3", ["'query_hidden_dim'"]),
    ],
)
def test_unknown_names_give_the_nearest(write, binding: str, expected: list[str]) -> None:
    for text in (message([], [binding]), message([write(f"# comment\n{binding}")], [])):
        assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    "binding",
    [
        "train_fn.num_epochs = 'ten'",
        "train_fn.num_epochs = 1.5",
        "train_fn.num_epochs = True",
        "train_fn.num_epochs = -1",
        "train_fn.learning_rate = 'fast'",
        "train_fn.learning_rate = 0.0",
        "train_fn.item_l2_norm = 1",
        "train_fn.main_module = 3",
        "train_fn.loss_weights = 0.1",
        "train_fn.local_batch_size = None",
        "train_fn.local_batch_size = 0",
        "train_fn.positional_sampling_ratio = 0.0",
        "train_fn.positional_sampling_ratio = 1.5",
        "train_fn.dropout_rate = 1.0",
        "train_fn.dropout_rate = -0.5",
        "train_fn.temperature = 0.0",
        "train_fn.protocol = 'leave_two_out'",
        "train_fn.next_time = 'maybe'",
        "hstu_encoder.concat_ua = 'no'",
        "create_data_loader.num_workers = [1]",
    ],
)
def test_values_that_cannot_be_name_the_setting(binding: str) -> None:
    assert binding.partition(" ")[0] in message([], [binding])


@pytest.mark.parametrize(
    "text",
    [
        "train_fn.num_epochs = ",
        "train_fn.num_epochs 3",
        "((((",
        "train_fn.num_epochs = [1, 2",
    ],
)
def test_syntax_errors_name_the_place(write, text: str) -> None:
    told = message([write(f"train_fn.num_epochs = 3\n{text}")], [])
    assert "experiment.gin" in told or "line 2" in told


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("train_fn.dataset_name=music", "= music: a string needs quotes, as train_fn.dataset_name = 'music'"),
        ("train_fn.dataset_name = ml-1m", "train_fn.dataset_name = 'ml-1m'"),
        ("train_fn.item_l2_norm = true", "true is no value: write True"),
        ("train_fn.event_features = [shelf]", "shelf is no value; a string needs quotes, as 'shelf'"),
        ("train_fn.num_epochs = open('x')", "open is no value"),
    ],
)  # fmt: skip
def test_words_without_quotes(write, binding: str, expected: str) -> None:
    for text in (message([], [binding]), message([write(f"# comment\n{binding}\n")], [])):
        assert expected in text and "0x" not in text
    assert "line 2" in text


@pytest.mark.parametrize(
    ("binding", "instead"),
    [
        ("train_fn.restore_from_ckpt = 'x'", "train_fn.restore_from_ckpt is no setting here: give --resume"),
        ("get_sequential_encoder.module_type = 'HSTU'", "bind train_fn.main_module"),
        ("get_sequential_encoder.max_output_length = 11", "bind train_fn.gr_output_length"),
        ("create_mol_interaction_module.item_embedding_dim = 8", "bind train_fn.item_embedding_dim"),
    ],
)
def test_published_parameters_that_act_elsewhere_say_where(binding: str, instead: str) -> None:
    assert instead in message([], [binding])
    name = binding.partition(" = ")[0]
    assert load_settings([], [f"{name} = None"]) == RunSettings()


def test_published_parameters_that_act() -> None:
    settings = load_settings([], [
        "create_mol_interaction_module.eps = 1e-5", "get_similarity_function.activation_checkpoint = True",
    ])  # fmt: skip
    assert settings.value("create_mol_interaction_module.eps") == 1e-5
    assert settings.similarity.activation_checkpoint


def test_missing_files(tmp_path: Path, write) -> None:
    assert str(tmp_path / "none.gin") in message([tmp_path / "none.gin"], [])
    assert "other.gin" in message([write("include 'other.gin'")], [])


def test_settings_survive_json(write) -> None:
    settings = load_settings([write(PUBLISHED)], ["item_tower.features = ('item_id', 'genre')"])
    data = json.loads(json.dumps(settings.to_json()))
    assert RunSettings.from_json(data) == settings
    assert RunSettings.from_json({}) == RunSettings()


def test_settings_in_groups_are_read_too() -> None:
    """As checkpoints held them before sections were named by their owners in gin."""
    groups = {
        "model": {"main_module": "TwoTower", "temperature": 0.5, "next_time": "hidden"},
        "loss": {"objective": "masked", "mask_probability": None, "label_smoothing": 0.0},
        "optimizer": {"optimizer": "lazy_adamw"},
        "negatives": {"mixed_shares": {"local": 0.5, "popularity": 0.5}},
        "encoder": {"activation_checkpoint": True},
        "queries": {"query_module": "HSTU", "query_features": ["age"]},
        "similarity": {"bf16_training": True, "activation_checkpoint": False},
        "options": {"hstu_encoder": {"dqk": 8}, "of_a_plugin_that_is_not_loaded": {"depth": 3}},
        "plugins": [],
    }
    read = RunSettings.from_json(groups)
    bound = RunSettings().bind({
        "train_fn.main_module": "TwoTower", "train_fn.temperature": 0.5, "train_fn.next_time": "hidden",
        "train_fn.objective": "masked", "train_fn.optimizer": "lazy_adamw", "hstu_encoder.dqk": 8,
        "get_sequential_encoder.activation_checkpoint": True, "item_tower.query_module": "HSTU",
        "item_tower.query_features": ("age",), "get_similarity_function.bf16_training": True,
    })  # fmt: skip
    assert differences(read, bound) == [("of_a_plugin_that_is_not_loaded.depth", 3, None)]
    assert read.encoder_name == "HSTU" and read.value("train_fn.mask_probability") == 0.15
    with pytest.raises(UserError, match="unknown section: 'optimiser'"):
        RunSettings.from_json({"optimiser": {}})


def test_a_published_name_and_the_parts_own_are_one_option() -> None:
    own, published = "SampledSoftmaxLoss.label_smoothing = 0.1", "train_fn.label_smoothing"
    both = message([], [own, f"{published} = 0.2"])
    assert "SampledSoftmaxLoss.label_smoothing = 0.1 and train_fn.label_smoothing = 0.2 are one option" in both
    settings = load_settings([], [own])
    resolved = resolved_text(settings)
    assert settings.value(published) == 0.1
    assert published not in resolved and "SampledSoftmaxLoss.label_smoothing = 0.1" in resolved
    later = override(settings, [f"{published} = 0.2"])
    assert later.value("SampledSoftmaxLoss.label_smoothing") == later.value(published) == 0.2
    assert override(later, [own]) == settings
    assert override(later, ["train_fn.loss_module = 'CE'"]).value("CE.label_smoothing") == 0.2


def test_a_published_name_has_the_range_of_the_chosen_part() -> None:
    zero = "train_fn.mask_probability = 0.0"
    assert load_settings([], ["train_fn.objective = 'masked'", zero]).value("masked_objective.mask_probability") == 0
    assert "train_fn.mask_probability must be above 0, got 0.0" in message(
        [], ["train_fn.objective = 'permuted'", zero]
    )
    assert load_settings([], ["train_fn.mask_probability = None"]) == RunSettings()


def test_checkpoints_keep_the_defaults_of_the_chosen_parts() -> None:
    saved = RunSettings().to_json()["options"]
    assert saved["sasrec_encoder"]["ffn_dropout_rate"] == 0.2 and "hstu_encoder" not in saved
    older = RunSettings.from_json({"options": {"sasrec_encoder": {"num_blocks": 2, "num_heads": 4}}})
    assert older.options == {"sasrec_encoder": {"num_heads": 4}}
    assert override(older, ["sasrec_encoder.num_heads = 1"]) == RunSettings()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"modle": {}}, "modle"),
        ({"train": {"epochs": 3}}, "epochs"),
        ({"train": {"num_negatives": 0}}, "num_negatives"),
        ({"train": 3}, "section 'train' is no object but '3'"),
        ({"sasrec": None}, "section 'sasrec' is no object"),
        ({"hstu": [["dqk", 4]]}, "section 'hstu' is no object"),
        ({"sasrec": {"num_blocks": "x"}}, "sasrec_encoder.num_blocks must be of type int, got 'x'"),
        ({"hstu": {"dqk": -4}}, "hstu_encoder.dqk must be 1 or more, got -4"),
        (
            {"mol": {"dot_product_dimension": 0}},
            "create_mol_interaction_module.dot_product_dimension must be 1 or more",
        ),
        (
            {"item_tower": {"features": None}},
            r"item_tower.features must be of type tuple\[str, ...\], got None",
        ),
        ({"item_tower": {"features": ["genre", 3]}}, "item_tower.features must be of type"),
        ({"weighted_loss": {"weights": {"mi_loss": "much"}}}, "get_weighted_loss.weights must be of type"),
        ({"train": {"item_embedding_dim": [1]}}, "item_embedding_dim must be of type int"),
    ],
)
def test_json_of_another_program(change: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refused:
        RunSettings.from_json({**RunSettings().to_json(), **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [[1], None, "train", 3])
def test_json_that_is_no_object(data: object) -> None:
    with pytest.raises(UserError, match="settings are no object"):
        RunSettings.from_json(data)


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (
            ["num_negatives = 7"],
            "'num_negatives' is no setting, and no %num_negatives refers to it; did you mean 'train_fn.num_negatives'",
        ),
        (["learning_rat = 7"], "did you mean"),
        (["wholly_else = 7"], "write it as OWNER.NAME"),
        (
            ["a/train_fn.num_negatives = 7"],
            "scopes have no effect here; write train_fn.num_negatives without 'a/'",
        ),
        (["train_fn.num_epochs = %nothing"], "nothing gives %nothing a value"),
        (["train_fn.num_epochs = @train_fn()"], "cannot refer to @train_fn"),
        (["a = %b", "b = %a", "train_fn.num_epochs = %a"], "one that holds itself"),
        (["a = [1]", "train_fn.loss_weights = {%a: 1.0}"], "keys are names or numbers"),
    ],
)
def test_what_would_bind_nothing_or_has_no_value_is_refused(bindings: list[str], words: str) -> None:
    assert words in message([], bindings)
    with pytest.raises(UserError, match=re.escape(words)):
        override(RunSettings(), bindings)


def test_names_for_values_act_over_settings_too() -> None:
    bindings = ["kept = 'none'", "train_fn.seen_filter = %kept"]
    assert load_settings([], bindings).evaluation.seen_filter == "none"
    assert override(RunSettings(), bindings).evaluation.seen_filter == "none"


def test_values_that_grow_without_measure_are_refused() -> None:
    nested = ["m0 = [1]", *(f"m{i + 1} = [{', '.join([f'%m{i}'] * 10)}]" for i in range(12))]
    assert "more than 10000 entries" in message([], [*nested, "train_fn.loss_weights = %m12"])
    assert "one that holds itself" in message([], ["a = [%a]", "train_fn.loss_weights = %a"])
    assert "joins more than 100 strings" in message([], ["train_fn.protocol = (" + "'a' " * 5000 + ")"])
    joined = "train_fn.protocol = ('leave_' 'one'\n  '_out')"
    assert load_settings([], [joined]).data.protocol == "leave_one_out"


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("hstu_encoder.dqk = -4", "hstu_encoder.dqk must be 1 or more, got -4"),
        ("sasrec_encoder.num_blocks = 20000", "sasrec_encoder.num_blocks must be at most 1000, got 20000"),
        ("hstu_encoder.num_heads = 20000", "hstu_encoder.num_heads must be at most 1000, got 20000"),
        ("train_fn.max_sequence_length = 1048577", "must be at most 1048576, got 1048577"),
        ("train_fn.dropout_rate = 1.0", "must be below 1, got 1.0"),
    ],
)
def test_limits_are_shown_with_all_their_digits(binding: str, words: str) -> None:
    assert words in message([], [binding])
