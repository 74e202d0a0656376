"""main.py --mode=export on a run of release 0.1.0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from disks import disk
from generative_recommenders import Recommender
from generative_recommenders.commands import export as command
from generative_recommenders.commands.export import export as write
from generative_recommenders.commands.setup import Options
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval import export as exports
from programs import run_program
from recommender_runs import MOL, make_run
from tiny_data import ragged_sequences, tiny_dataset

RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(RELEASE / "runs" / "sasrec", tmp_path / "run")
    return tmp_path / "run"


def export(run: Path, form: str, *flags: str):
    return run_program("main.py", "--mode=export", f"--run_dir={run}", f"--format={form}", *flags)


def test_states_and_items_score_as_the_recommender(run: Path, tmp_path: Path) -> None:
    for form in ("torch", "safetensors"):
        done = export(run, form)
        assert done.returncode == 0, done.stderr
    folder = run / "export"
    assert {path.name for path in folder.iterdir()} == {
        "query_encoder.pt2", "item_embeddings.safetensors", "item_ids.txt", "export.json",
    }  # fmt: skip
    about = json.loads((folder / "export.json").read_text())
    assert set(about["formats"]) == {"torch", "safetensors"}  # one does not forget the other
    assert list(about["formats"]["torch"]["inputs"]) == ["item_ids", "lengths"]
    items = safetensors.torch.load_file(folder / "item_embeddings.safetensors")["item_embeddings"]
    names = (folder / "item_ids.txt").read_text().splitlines()
    rec = Recommender.load(run)
    history = names[3:6]
    encoder = torch.export.load(folder / "query_encoder.pt2").module()
    states = encoder(torch.tensor([[4, 5, 6]]), torch.tensor([3]))
    temperature = rec.model.similarity.temperature
    best = (states @ items.T / temperature)[0].topk(5)
    answer = rec.recommend({"a": history}, k=5, exclude_seen=False)
    assert answer["item_id"].tolist() == [names[i] for i in best.indices.tolist()]
    assert answer["score"].tolist() == pytest.approx(best.values.tolist(), abs=1e-4)


def test_items_as_parquet(run: Path, tmp_path: Path) -> None:
    assert export(run, "parquet", f"--output={tmp_path / 'out'}").returncode == 0
    table = pq.read_table(tmp_path / "out" / "item_embeddings.parquet")
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert table["item_id"].to_pylist() == (tmp_path / "out" / "item_ids.txt").read_text().splitlines()
    assert table["embedding"].type.list_size == about["width"] and len(table) == about["items"]


def of_run(run: Path) -> Options:
    return Options((), (), run, run_dir=str(run))


def test_files_of_another_model_are_forgotten(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for form in ("safetensors", "parquet"):
        write(of_run(run), form, out, "exact")
    assert set(json.loads((out / "export.json").read_text())["formats"]) == {"safetensors", "parquet"}
    rec = Recommender.load(run)
    with torch.no_grad():
        rec.model.items.table.mul_(2)
    rec.save(tmp_path / "other" / "run")  # of the same name
    write(of_run(tmp_path / "other" / "run"), "parquet", out, "exact")
    assert set(json.loads((out / "export.json").read_text())["formats"]) == {"parquet"}


def test_weights_of_an_encoder_are_moved_and_removed_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(command, "export_program", lambda recommender: None)
    for data in (["query_encoder.onnx.data"], []):
        monkeypatch.setattr(
            command, "write_onnx",
            lambda program, path, names, data=data: [path.with_name(name).touch() for name in [path.name, *data]],
        )  # fmt: skip
        write(of_run(run), "onnx", None, "exact")
        written = {path.name for path in (run / "export").iterdir()}
        assert written == {"query_encoder.onnx", "item_ids.txt", "export.json", *data}
        about = json.loads((run / "export" / "export.json").read_text())["formats"]["onnx"]
        assert [about[name] for name in ("weights",) if name in about] == data


@pytest.mark.slow
def test_an_encoder_is_read_with_the_file_of_its_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    program = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 1)  # bytes of one file
    write(of_run(run), "onnx", None, "exact")
    about = json.loads((run / "export" / "export.json").read_text())["formats"]["onnx"]
    assert (run / "export" / about["weights"]).stat().st_size > 10_000
    onnxruntime.InferenceSession(run / "export" / "query_encoder.onnx", providers=["CPUExecutionProvider"])


def test_what_an_export_needs_beside_the_vectors_is_written(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "data", ragged_sequences(57, 30, seed=5))
    run, _, _ = make_run(tmp_path, dataset, MOL)
    rec = Recommender.load(run)
    rec.facts["event_columns"] = [{"name": "shelf", "kind": "categorical", "categories": ["a", "b"]}]
    rec.facts["trained_items"] = 50  # as `add_items` leaves it
    rec.save(tmp_path / "with columns")
    write(of_run(tmp_path / "with columns"), "safetensors", tmp_path / "out", "exact")
    assert (tmp_path / "out" / "user_ids.txt").read_text().splitlines() == dataset.original_user_ids().to_pylist()
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["event_columns"] == rec.facts["event_columns"] and about["trained_items"] == 50


def test_an_id_that_holds_the_end_of_a_line_is_refused(run: Path, tmp_path: Path) -> None:
    rec = Recommender.load(run)
    names = ["two\nlines", *rec.item_ids.to_pylist()[1:]]
    Recommender(rec.settings, rec.model, pa.array(names), counts=rec.counts, facts=rec.facts).save(tmp_path / "lines")
    with pytest.raises(UserError, match=r"item id 'two\\nlines' holds the end of a line"):
        write(of_run(tmp_path / "lines"), "parquet", None, "exact")
    assert not (tmp_path / "lines" / "export").exists()


def test_what_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out" / "items.hnsw.faiss").mkdir(parents=True)
    monkeypatch.setattr(exports, "find_spec", lambda name: "any")
    for output, index in ((tmp_path / "file", "exact"), (tmp_path / "out", "hnsw")):
        with pytest.raises(UserError, match="--output="):
            write(of_run(tmp_path), "faiss", output, index)
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnx is not installed; the extra 'export' has it"):
        write(of_run(tmp_path), "onnx", None, "exact")


@pytest.mark.parametrize("form", command.FILES)
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(run: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip({"onnx": "onnxscript", "faiss": "faiss"}.get(form, "torch"))
    with disk(tmp_path / "disk", "size=64k") as small:
        with pytest.raises(OSError, match="No space"):
            (small / "other").write_bytes(bytes(2**20))
        with pytest.raises(UserError, match=r"disk/[a-z_0-9.]+: cannot be written: .*No space left on device"):
            write(of_run(run), form, small, "exact")
        assert [each.name for each in small.iterdir()] == ["other"]


@pytest.mark.parametrize("form", ["torch", "faiss"])
def test_an_export_that_fails_at_its_work_leaves_no_folder(
    run: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(command, "check_installed", lambda form: None)
    for name in ("export_program", "check_products"):
        monkeypatch.setattr(command, name, fail)
    with pytest.raises(OSError, match="no C compiler"):  # and no line about a file that cannot be written
        write(of_run(run), form, None, "exact")
    assert not (run / "export").exists()
