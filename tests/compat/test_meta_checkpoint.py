"""Conversion of the published HSTU and SASRec checkpoints, and refusal of unsafe files."""

import pickle
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from generative_recommenders.compat.meta.checkpoint import (
    are_numbers,
    load_meta_checkpoint,
    read_meta_checkpoint,
    rename_parameters,
    reorder_items,
)
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.hstu import HSTU
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.modeling.input_preprocessors import (
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.items import LocalEmbeddingModule
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.output_postprocessors import L2NormEmbeddingPostprocessor
from golden_parity import read_golden
from memory import memory_grows_at_most

CASES = ("meta_sasrec", "meta_hstu", "meta_hstu_concat_ua", "meta_hstu_no_bias")


def golden(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    arrays, meta = read_golden(case)
    return meta["config"], arrays


def parameters(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}


def save(path: Path, values: dict[str, torch.Tensor]) -> Path:
    state = {f"module.{name}": value for name, value in values.items()}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}, path)
    return path


def encoder(c: dict, length: int) -> torch.nn.Module:
    if "dqk" not in c:
        return SASRec(c["embedding_dim"], c["num_blocks"], c["num_heads"], c["ffn_hidden_dim"], c["activation"], 0.0)
    return HSTU(
        c["embedding_dim"], length, c["num_blocks"], c["num_heads"], c["dqk"], c["dv"],
        concat_ua=c["concat_ua"], enable_relative_attention_bias=c["relative_attention_bias"],
    )  # fmt: skip


def model(c: dict) -> SequenceRecommender:
    """With as many positions as the encoder has; the file may hold more."""
    length = c["max_sequence_len"] + c["max_output_len"]
    preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(length, c["embedding_dim"], 0.0)
    sequence = SequenceEncoder(preprocessor, encoder(c, length), L2NormEmbeddingPostprocessor())
    items = LocalEmbeddingModule(c["num_items"], c["embedding_dim"])
    return SequenceRecommender(items, sequence, torch.nn.Identity()).eval()


def encode(recommender: SequenceRecommender, arrays: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    events = {"timestamps": arrays["input/timestamps"]} if "input/timestamps" in arrays else None
    with torch.no_grad():
        return recommender(arrays["input/past_lengths"], ids, None, events)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_gives_the_published_programs_numbers(tmp_path, case):
    config, arrays = golden(case)
    recommender = model(config)
    load_meta_checkpoint(recommender, save(tmp_path / "ckpt", parameters(arrays)), None)
    found = encode(recommender, arrays, arrays["input/past_ids"])
    assert torch.allclose(found, arrays["output/encoded"], atol=1e-5)


def test_items_are_found_by_their_original_ids(tmp_path):
    """Internal ids follow the text order of the original ids: 1, 10, 11, ..., 2, 20, 3, ..."""
    config, arrays = golden("meta_sasrec")
    original = sorted(map(str, range(1, config["num_items"] + 1)))
    internal = {int(text): row for row, text in enumerate(original, start=1)} | {0: 0}
    recommender = model(config)
    load_meta_checkpoint(recommender, save(tmp_path / "ckpt", parameters(arrays)), pa.array(original))
    ids = arrays["input/past_ids"].clone().apply_(internal.__getitem__)
    assert not torch.equal(ids, arrays["input/past_ids"])
    assert torch.allclose(encode(recommender, arrays, ids), arrays["output/encoded"], atol=1e-5)


def test_items_that_the_data_lack_are_left_out():
    table = torch.arange(10.0)[:, None]
    assert reorder_items(table, pa.array(["3", "9"])).squeeze(-1).tolist() == [0, 3, 9]


def test_ids_that_begin_at_0_are_rows_further_on():
    """As the authors' reader shifts them in their file of Books."""
    table = torch.arange(13.0)[:, None]
    assert reorder_items(table, pa.array(["0", "1", "10", "2"])).squeeze(-1).tolist() == [0, 1, 2, 11, 3]
    with pytest.raises(UserError, match="item id 12 .* ends at id 11"):
        reorder_items(table, pa.array(["0", "12"]))


def test_numbers_are_told_from_other_ids():
    assert are_numbers(pa.array(["10", "3952"])) and are_numbers(pa.array(["0", "1", "10"]))
    assert not are_numbers(pa.array(["1", "B000FA5SHK"]))
    assert not are_numbers(pa.array(["0001713353", "1713353"]))


@pytest.mark.parametrize(
    ("ids", "said"), [(["1", "B00X"], "not integers"), (["1", "10"], "item id 10"), (["-1"], "item id -1")]
)
def test_ids_that_do_not_fit(ids, said):
    with pytest.raises(UserError, match=said):
        reorder_items(torch.zeros(10, 2), pa.array(ids))


def changed(values: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    position = "_input_features_preproc._pos_emb.weight"
    changes = {
        "unknown": {**values, "_ndp_module._gate": torch.zeros(1)},
        "missing": {name: value for name, value in values.items() if "0.out_proj" not in name},
        "more blocks": {**values, "attention_layers.2.in_proj_bias": torch.zeros(24)},
        "wide": {**values, "attention_layers.0.in_proj_bias": torch.zeros(25)},
        "short": {**values, position: values[position][:5]},
    }
    return changes[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("unknown", "unknown parameters _ndp_module._gate"),
        (
            "missing",
            "lacks sequence.encoder.blocks.0.out_proj.bias, sequence.encoder.blocks.0.out_proj.weight",
        ),
        ("more blocks", "has sequence.encoder.blocks.2.in_proj.bias"),
        ("wide", r"is \[25\] in the checkpoint and \[24\]"),
        ("short", r"position is \[5, 8\] in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_reports_one_line_error(tmp_path, how, said):
    config, arrays = golden("meta_sasrec")
    path = save(tmp_path / "ckpt", changed(parameters(arrays), how))
    with pytest.raises(UserError, match=said) as caught:
        load_meta_checkpoint(model(config), path, None)
    assert "\n" not in str(caught.value)


def test_names_without_the_prefix_of_parallel_training(tmp_path):
    torch.save({"model_state_dict": {"_hstu._attention_layers.3._uvqk": torch.ones(2)}}, tmp_path / "ckpt")
    assert list(rename_parameters(read_meta_checkpoint(tmp_path / "ckpt"))) == ["sequence.encoder.blocks.3.uvqk"]


TABLE = "_embedding_module._item_emb.weight"
ODD = {
    "sparse": (lambda: torch.ones(4, 8).to_sparse(), "no plain tensor"),
    "csr": (lambda: torch.ones(4, 8).to_sparse_csr(), "no plain tensor"),
    "meta": (lambda: torch.empty(4, 8, device="meta"), "no plain tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8), "holds qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "no plain tensor"),
    "0-d": (lambda: torch.tensor(1.0), "has 0 dimensions, not 2"),
    "1-d": (lambda: torch.ones(4), "has 1 dimensions, not 2"),
    "complex": (lambda: torch.ones(4, 8, dtype=torch.complex64), "holds complex64"),
    "whole numbers": (lambda: torch.ones(4, 8, dtype=torch.int64), "holds int64"),
    "8 bits": (lambda: torch.ones(4, 8).to(torch.float8_e4m3fn), "holds float8_e4m3fn"),
    "NaN": (lambda: torch.full((4, 8), float("nan")), "holds NaN or infinite values"),
    "infinite": (lambda: torch.full((4, 8), float("-inf"), dtype=torch.bfloat16), "holds NaN or infinite"),
    "infinite in float32": (lambda: torch.full((4, 8), 1e300, dtype=torch.float64), "holds NaN or infinite"),
    "stretched": (lambda: torch.ones(1).expand(100, 4_000_000), r"fewer values .* \[100, 4000000\]"),
}


@pytest.mark.parametrize("item_ids", [None, pa.array(["1", "2", "3"])])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore")
@memory_grows_at_most(100)
def test_tensors_that_are_no_weights_are_refused(tmp_path, odd, item_ids):
    """Before they are reordered, compared or copied."""
    make, said = ODD[odd]
    config, arrays = golden("meta_sasrec")
    path = save(tmp_path / "ckpt", {**parameters(arrays), TABLE: make()})
    with pytest.raises(UserError, match=f"{TABLE} of the checkpoint .*{said}") as caught:
        load_meta_checkpoint(model(config), path, item_ids)
    assert "\n" not in str(caught.value)


def test_weights_of_other_precisions_and_strides_are_read(tmp_path):
    config, arrays = golden("meta_sasrec")
    values = {
        name: value.t().contiguous().t().double() for name, value in parameters(arrays).items() if value.dim() == 2
    }
    recommender = model(config)
    load_meta_checkpoint(recommender, save(tmp_path / "ckpt", {**parameters(arrays), **values}), None)
    assert torch.allclose(encode(recommender, arrays, arrays["input/past_ids"]), arrays["output/encoded"], atol=1e-5)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, writer):
    content = {"model_state_dict": {"w": Payload(tmp_path / "ran")}}
    path = tmp_path / "ckpt"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="cannot|can be read as plain tensors") as caught:
        read_meta_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}, {"model_state_dict": {"w": 1}}, {"model_state_dict": 3}])
def test_other_contents_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt")
    with pytest.raises(UserError, match="holds no model_state_dict"):
        read_meta_checkpoint(tmp_path / "ckpt")


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_meta_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("mutants", [500, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("zipped", [True, False])
@memory_grows_at_most(256)
def test_mutated_files_are_read_or_refused(tmp_path, mutants, zipped):
    path = tmp_path / "ckpt"
    state = {"model_state_dict": {"w": torch.arange(6.0), "v": torch.ones(2, 2)}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(mutants):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 6)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content[: generator.randrange(len(content))] if generator.random() < 0.2 else content)
        try:
            read_meta_checkpoint(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > mutants // 10


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_builds_more_than_it_holds_is_refused_unread(tmp_path: Path, zipped: bool) -> None:
    class Long:
        def __reduce__(self) -> tuple:
            return bytearray, (2 << 30,)

    path = tmp_path / "a.ckpt"
    torch.save({"model_state_dict": {"a": torch.zeros(1)}, "b": Long()}, path, _use_new_zipfile_serialization=zipped)
    with memory_grows_at_most(64), pytest.raises(UserError, match="it builds a bytearray"):
        read_meta_checkpoint(path)


def test_packed_entries_are_refused(tmp_path: Path) -> None:
    plain, packed = save(tmp_path / "plain.ckpt", {"a": torch.zeros(1 << 20)}), tmp_path / "packed.ckpt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as sink:
        for entry in source.infolist():
            sink.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match="its entries are packed"):
        read_meta_checkpoint(packed)
