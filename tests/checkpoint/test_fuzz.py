"""Mutated checkpoints: each is loaded as it was written or refused in one line, and no code of it runs."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from memory import memory_grows_at_most
from programs import quick_start

MUTANTS = [300, pytest.param(100_000, marks=pytest.mark.slow)]
WORDS = (b"null", b"{", b"]", b'"', b"1e999", b"-1", b"../", b"\xff\xfe", b"9" * 30, b"[" * 3000)


@pytest.fixture
def whole(tmp_path) -> Path:
    store = CheckpointStore(tmp_path / "whole")
    store.attach(pa.array(["a", "b,c", "книга"]), RunSettings().to_json(), "a.b = 1\n")
    tensors = {
        "w": torch.arange(6.0).view(2, 3),
        "h": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(3),
    }
    return store.save((2, 17), tensors, {"seed": 1, "list": [1, 2.5, None]}, metric=0.5, is_best=True)


def mutate(content: bytes, generator: random.Random) -> bytes:
    """A few bytes flipped, cut out, doubled or replaced by something that parsers trip over."""
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(content) + 1)
        end = min(len(content), start + generator.choice((0, 1, 1, 4, 40)))
        middle = generator.choice(
            (b"", content[start:end] * 2, generator.randbytes(end - start), generator.choice(WORDS))
        )
        content = content[:start] + middle + content[end:]
    return content


def everything(loaded: Checkpoint) -> str:
    tensors = {name: (str(value.dtype), value.tolist()) for name, value in sorted(loaded.tensors.items())}
    rest = (loaded.state, loaded.metric, loaded.is_best, loaded.item_ids().to_pylist())
    settings = RunSettings.from_json(loaded.settings()).to_json()
    return json.dumps([tensors, loaded.position, *rest, settings])


def outcome(store: CheckpointStore, folder: Path) -> str | None:
    """All that a checkpoint holds, or None where it is refused in one line."""
    try:
        return everything(store.load(folder))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return None


@pytest.mark.parametrize("mutants", MUTANTS)
@memory_grows_at_most(256)
def test_a_mutated_checkpoint_is_never_loaded(tmp_path, whole, mutants):
    generator = random.Random(0)
    store = CheckpointStore(tmp_path / "other", read_only=True)
    original = outcome(store, whole)
    assert original is not None
    folder = shutil.copytree(whole, tmp_path / "mutant")
    names = sorted(path.name for path in folder.iterdir())
    for _ in range(mutants):
        path = folder / generator.choice(names)
        before = path.read_bytes()
        after = mutate(before, generator)
        path.write_bytes(after)
        assert (outcome(store, folder) is None) or after == before or same_json(path.name, after, before)
        path.write_bytes(before)
    assert outcome(store, folder) == original


def same_json(name: str, after: bytes, before: bytes) -> bool:
    """Blank space in the manifest, which cannot hold its own checksum, may change."""
    return name == "manifest.json" and json.loads(after) == json.loads(before)


def seal(folder: Path) -> None:
    """Makes the manifest's checksums right again, as one who forges a checkpoint would."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_sealed(folder, manifest)


def write_sealed(folder: Path, manifest: dict[str, Any]) -> None:
    """A manifest with its own checksum."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": checksum}))


@pytest.mark.parametrize("mutants", MUTANTS)
@memory_grows_at_most(256)
def test_a_forged_checkpoint_is_loaded_or_refused(tmp_path, whole, mutants):
    """With right checksums the files' own parsers are reached."""
    generator = random.Random(1)
    store = CheckpointStore(tmp_path / "other", read_only=True)
    folder = shutil.copytree(whole, tmp_path / "mutant")
    refused = 0
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    for _ in range(mutants):
        path = folder / generator.choice(names)
        before = path.read_bytes()
        path.write_bytes(mutate(before, generator))
        seal(folder)
        refused += outcome(store, folder) is None
        path.write_bytes(before)
    assert mutants // 5 < refused < mutants


def forge_ids(path: Path, how: str) -> None:
    """A few KB that are 150 MB of item ids, or more, when read."""
    repeated = pa.array(["x" * 1_000_000]).take(pa.array([0] * 150))
    values = pa.nulls(100_000_000, pa.string()) if how == "nulls" else repeated
    pq.write_table(
        pa.table({"item_id": values}), path, write_statistics=False, compression="zstd", use_dictionary=False
    )


def read_forged_ids(folder: Path) -> None:
    with memory_grows_at_most(100), pytest.raises(UserError, match=r"item_ids.parquet: it is packed"):
        CheckpointStore(folder.parent, read_only=True).load(folder).item_ids()


@pytest.mark.parametrize("how", ["compressed", "nulls"])
def test_packed_item_ids_are_refused_before_they_fill_the_memory(whole, how):
    """Made and read by processes of their own: the peak of this one may be high already."""
    path = whole / "item_ids.parquet"
    in_process(forge_ids, path, how)
    assert path.stat().st_size < 2_000_000
    seal(whole)
    in_process(read_forged_ids, whole)


def in_process(work: Callable[..., None], *arguments: object) -> None:
    process = quick_start().Process(target=work, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


VALUES = (None, -1, 2**70, 3, 1.5, True, "", "x" * 200, [], {}, float("inf"))
ACCEPTED = {"metric": [None, -1, 3, 1.5], "is_best": [True], "epoch": [3], "step": [3]}


@pytest.mark.parametrize("key", ["format", "version", "epoch", "step", "metric", "is_best", "files"])
def test_a_forged_manifest_is_loaded_or_refused(tmp_path, whole, key):
    store = CheckpointStore(tmp_path / "other", read_only=True)
    manifest = json.loads((whole / "manifest.json").read_bytes())
    accepted = []
    for value in VALUES:
        write_sealed(whole, {**manifest, key: value})
        if outcome(store, whole) is not None:
            accepted.append(value)
    assert accepted == ACCEPTED.get(key, [])


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "tensors.safetensors/../state.json", ""])
def test_a_manifest_names_no_files_elsewhere(tmp_path, whole, name):
    manifest = json.loads((whole / "manifest.json").read_bytes())
    manifest["files"][name] = manifest["files"]["state.json"]
    (whole.parent / "outside").write_bytes((whole / "state.json").read_bytes())
    write_sealed(whole, manifest)
    with pytest.raises(UserError, match="does not list the files of a checkpoint"):
        CheckpointStore(tmp_path / "other", read_only=True).load(whole)
