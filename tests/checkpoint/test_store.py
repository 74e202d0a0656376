"""Checkpoint store: writing, retention, damaged checkpoints, shards, and failing disks."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from absl import logging

from generative_recommenders.checkpoint.files import VERSION, DamagedCheckpoint, Manifest, write_manifest
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.checkpoint.weights import data_tensors, user_ids
from generative_recommenders.errors import UserError
from programs import quick_start

IDS = pa.array(["0306406152", 'comma, "quote"', "книга"])


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    base = torch.full((3, 4), value)
    return {
        "weight": base,
        "shared": base,
        "view": base.t(),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(3),
        "scalar": torch.tensor(value),
        "empty": torch.zeros(0, 4),
    }


def store_with(folder: Path, steps: int, **options) -> CheckpointStore:
    store = CheckpointStore(folder, **options)
    store.attach(IDS, {"dim": 4}, "train_fn.num_epochs = 3\n")
    for step in range(1, steps + 1):
        store.save((0, step), tensors(step), {"seen": step})
    return store


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_round_trip(tmp_path):
    store = store_with(tmp_path, 0)
    state = {"learning_rate": 0.1 + 0.2, "best": float("-inf"), "name": "книга", "list": [1, None, True]}
    store.save((3, 120), tensors(0.1), state, metric=0.25, is_best=True)
    loaded = CheckpointStore(tmp_path).load_newest()
    assert loaded.position == (3, 120) and loaded.metric == 0.25 and loaded.is_best
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors().keys()
    for name, expected in tensors(0.1).items():
        assert loaded.tensors[name].dtype == expected.dtype
        assert torch.equal(loaded.tensors[name], expected), name


def test_a_copied_checkpoint_loads_alone(tmp_path):
    path = store_with(tmp_path / "run", 1).paths()[0]
    moved = path.rename(tmp_path / "handed over")
    loaded = CheckpointStore(tmp_path / "empty", read_only=True).load(moved)
    assert loaded.item_ids().to_pylist() == IDS.to_pylist()
    assert loaded.settings() == {"dim": 4}
    assert (moved / "resolved.gin").read_text() == "train_fn.num_epochs = 3\n"
    assert not (tmp_path / "empty").exists()


def test_attaching_anew_leaves_older_checkpoints_as_they_were(tmp_path):
    store = store_with(tmp_path, 1)
    store.attach(IDS, {"dim": 8}, "")
    store.save((0, 2), tensors(), {})
    assert [store.load(path).settings()["dim"] for path in store.paths()] == [4, 8]


def test_keeps_the_last_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, best in enumerate([True, True, False, False, False, False], start=1):
        store.save((0, step), {"w": torch.tensor(step)}, {}, metric=1.0 / step, is_best=best)
    assert [store.load(path).position.step for path in store.paths()] == [2, 5, 6]
    assert CheckpointStore(tmp_path, keep_last=2).load_best().position.step == 2
    assert store.load_newest().position.step == 6


def test_a_best_one_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    writer = CheckpointStore(tmp_path, keep_last=1)
    writer.save((1, 1), tensors(1.0), {"seen": 1}, is_best=True)
    load = CheckpointStore.load

    def replaced(store, path):
        monkeypatch.setattr(CheckpointStore, "load", load)
        writer.save((2, 2), tensors(2.0), {"seen": 2}, is_best=True)
        writer.save((3, 3), tensors(3.0), {"seen": 3})
        return load(store, path)

    monkeypatch.setattr(CheckpointStore, "load", replaced)
    assert CheckpointStore(tmp_path, read_only=True).load_best_or_newest().state == {"seen": 2}


def test_nothing_saved(tmp_path):
    store = CheckpointStore(tmp_path / "new")
    assert store.load_newest() is None and store.load_best() is None and store.paths() == []


def test_newest_is_the_last_written_whatever_its_position(tmp_path):
    """A run that went back to an older checkpoint writes the same positions again."""
    store = CheckpointStore(tmp_path)
    for step, value in [(100, 1.0), (200, 2.0), (100, 3.0)]:
        store.save((0, step), {"w": torch.tensor(value)}, {})
    assert store.load_newest().tensors["w"] == 3.0


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    """In place, as `flip_bit`: a file that checkpoints share would be damaged in all of them."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_bit, cut, Path.unlink])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "tensors.safetensors", "state.json", "item_ids.parquet", "settings.json", "resolved.gin"],
)
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, warnings, damage, name):
    store = store_with(tmp_path, 3)
    damaged = store.paths()[-1]
    damage(damaged / name)
    with pytest.raises(DamagedCheckpoint):
        store.load(damaged)
    assert store.load_newest().state == {"seen": 2}
    assert len(warnings) == 1 and str(damaged) in warnings[0] and "\n" not in warnings[0]
    assert store.paths()[-1].name == "000002-epoch-0-step-2"


def test_settings_and_the_best_are_found_without_reading_tensors(tmp_path, warnings, monkeypatch):
    store = store_with(tmp_path, 1)
    for step in (2, 3):
        store.attach(IDS, {"dim": step}, "")
        store.save((0, step), tensors(step), {}, is_best=step == 2)
    monkeypatch.setattr("generative_recommenders.checkpoint.store.read_tensors", None)
    assert store.newest_settings() == {"dim": 3}
    assert store.best_path() == store.paths()[1]
    flip_bit(store.paths()[2] / "settings.json")
    assert store.newest_settings() == {"dim": 2}
    assert len(warnings) == 1 and "settings.json is not what was written; the checkpoint before it" in warnings[0]


USERS = {
    "plain": (["u1", "книга", ""], 0),
    "slice": (["x", "yy", "zzz", "w"], 1),
    "none": ([], 0),
}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("name", USERS)
def test_ids_of_users_are_their_bytes_and_where_they_end(tmp_path, name, kind):
    ids, first = USERS[name]
    texts = [each.encode() for each in ids[first:]]
    found = data_tensors(None, pa.chunked_array([pa.array(ids, kind)[first:]]))
    assert found["data.user_ids.bytes"].numpy().tobytes() == (b"".join(texts) or b"\0")
    assert found["data.user_ids.offsets"].tolist() == [0, *np.cumsum([len(each) for each in texts])]
    store = CheckpointStore(tmp_path)
    loaded = store.load(store.save((0, 1), found, {}))
    assert user_ids(loaded).to_pylist() == ids[first:]


@pytest.mark.parametrize(
    ("data", "bounds"),
    [(b"\xff\xfe", [0, 2]), (b"ab", [0, 3]), (b"ab", [0, 2, 1]), (b"ab", [-1, 2])],
)
def test_forged_ids_of_users_are_refused(tmp_path, data, bounds):
    forged = {
        "data.user_ids.bytes": torch.frombuffer(bytearray(data), dtype=torch.uint8),
        "data.user_ids.offsets": torch.tensor(bounds, dtype=torch.int64),
    }
    store = CheckpointStore(tmp_path)
    loaded = store.load(store.save((0, 1), forged, {}))
    with pytest.raises(UserError, match="its ids of users are no text"):
        user_ids(loaded)


def test_a_damaged_best_takes_the_place_of_no_other(tmp_path, warnings):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step, best in [(1, True), (2, False), (3, True)]:
        store.save((0, step), tensors(step), {}, is_best=best)
    cut(store.paths()[-1] / "tensors.safetensors")
    assert store.load_newest().position.step == 2
    assert warnings[0].endswith("the checkpoint before it is used, it is set aside as damaged-000003-epoch-0-step-3")
    for step in (4, 5, 6):
        store.save((0, step), tensors(step), {})
    assert [store.load(path).position.step for path in store.paths()] == [1, 4, 5, 6]
    assert store.load_best().position.step == 1
    assert (tmp_path / "damaged-000003-epoch-0-step-3").is_dir() and len(warnings) == 1


def test_serial_numbers_of_damaged_checkpoints_are_not_used_again(tmp_path, warnings):
    store = store_with(tmp_path, 2)
    for _ in range(2):
        cut(store.paths()[-1] / "state.json")
        assert store.load_newest().state == {"seen": 1}
        store.save((0, 2), tensors(2), {"seen": 2})
    assert [path.name[:6] for path in store.paths()] == ["000001", "000004"]
    assert len(list(tmp_path.glob("damaged-*"))) == len(warnings) == 2


def test_a_reader_sets_nothing_aside(tmp_path, warnings):
    store = store_with(tmp_path, 2)
    cut(store.paths()[-1] / "state.json")
    before = store.paths()
    assert CheckpointStore(tmp_path, read_only=True).load_newest().state == {"seen": 1}
    assert store.paths() == before and "set aside" not in warnings[0]


def test_a_damaged_one_that_cannot_be_renamed_is_passed_over(tmp_path, warnings, monkeypatch):
    store = store_with(tmp_path, 2)
    cut(store.paths()[-1] / "state.json")

    def refuse(*names):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)
    assert store.load_newest().state == {"seen": 1}
    assert len(store.paths()) == 2 and "set aside" not in warnings[0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_file_that_cannot_be_read_is_no_damage(tmp_path, warnings, monkeypatch, number):
    """The run stops with one line: nothing is renamed, and no older checkpoint is taken instead."""
    store = store_with(tmp_path, 2)
    before = sorted(tmp_path.rglob("*"))
    whole = open

    def refuse(path, *arguments, **named):
        if str(path).endswith("000002-epoch-0-step-2/tensors.safetensors"):
            raise OSError(number, os.strerror(number), str(path))
        return whole(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=f"tensors.safetensors cannot be read: {os.strerror(number)}") as caught:
        store.load_newest()
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert sorted(tmp_path.rglob("*")) == before and not warnings


def test_too_many_open_files_is_no_damage(tmp_path, warnings):
    store = store_with(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UserError, match="Too many open files"):
            store.load_newest()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert store.load_newest().state == {"seen": 1} and not warnings


def test_right_checksums_of_what_no_program_of_ours_wrote_set_nothing_aside(tmp_path, warnings):
    store = store_with(tmp_path, 2)
    newest = store.paths()[-1]
    (newest / "tensors.safetensors").write_bytes(b"of another library")
    (newest / "manifest.json").unlink()
    write_manifest(newest, Manifest(epoch=0, step=2, metric=None, is_best=False))
    with pytest.raises(UserError, match="tensors.safetensors: "):
        store.load_newest()
    assert len(store.paths()) == 2 and not warnings


def test_a_pipe_among_the_files_keeps_nobody_waiting(tmp_path, warnings):
    store = store_with(tmp_path, 2)
    for name in ("manifest.json", "state.json"):
        (store.paths()[-1] / name).unlink()
        os.mkfifo(store.paths()[-1] / name)
        assert store.load_newest().state == {"seen": 1}
        store.save((0, 2), tensors(2), {"seen": 2})


def test_a_linked_folder_is_refused_before_anything_in_it_is_removed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".writing-000009-epoch-0-step-9").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a symbolic link"):
        CheckpointStore(tmp_path / "checkpoints")
    assert [path.name for path in elsewhere.iterdir()] == [".writing-000009-epoch-0-step-9"]


def test_all_damaged(tmp_path, warnings):
    store = store_with(tmp_path, 2)
    for path in store.paths():
        cut(path / "tensors.safetensors")
    assert store.load_newest() is None
    assert len(warnings) == 2


def test_unknown_version_is_refused(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr("generative_recommenders.checkpoint.files.VERSION", VERSION + 1)
    store.save((0, 2), tensors(), {})
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"version {VERSION + 1}, this program reads version {VERSION}") as caught:
        store.load_newest()
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_files_outside_the_folder_are_not_followed(tmp_path):
    path = store_with(tmp_path / "run", 1).paths()[0]
    outside = (path / "state.json").rename(tmp_path / "state.json")
    (path / "state.json").symlink_to(outside)
    with pytest.raises(DamagedCheckpoint, match="state.json is missing"):
        CheckpointStore(tmp_path / "run").load(path)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    store_with(tmp_path, 1)
    for name in (".writing-000009-epoch-0-step-9", ".removed-000001-epoch-0-step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    assert len(CheckpointStore(tmp_path, read_only=True).paths()) == 1
    assert len(list(tmp_path.glob(".*"))) == 2
    CheckpointStore(tmp_path)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("keep_last", [0, -1])
def test_keep_last_must_be_positive(tmp_path, keep_last):
    with pytest.raises(UserError, match="keep_last"):
        CheckpointStore(tmp_path, keep_last=keep_last)


def test_values_that_are_not_json_leave_nothing(tmp_path):
    store = store_with(tmp_path, 1)
    with pytest.raises(TypeError):
        store.save((0, 2), tensors(), {"bad": object()})
    assert [path.name for path in store.paths()] == ["000001-epoch-0-step-1"]
    assert list(tmp_path.glob(".*")) == []


def test_file_size_limit_reports_one_line_error_and_leaves_the_older_ones(tmp_path):
    """A limit on the size of files stands in for a full disk where none can be mounted."""
    store = store_with(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not write a checkpoint") as caught:
            store.save((0, 3), {"w": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "\n" not in str(caught.value)
    assert store.load_newest().state == {"seen": 2}
    assert list(tmp_path.glob(".*")) == []


def test_full_disk(small_disk):
    store = store_with(small_disk, 2)
    with pytest.raises(UserError, match=r"No space left on device.*older checkpoints are whole"):
        store.save((0, 3), {"w": torch.zeros(100_000)}, {})
    assert list(small_disk.glob(".*")) == []
    assert store.load_newest().state == {"seen": 2}
    store.save((0, 4), tensors(), {"seen": 4})
    assert store.load_newest().state == {"seen": 4}


def test_read_only_disk(small_disk):
    store = store_with(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        store.save((0, 2), tensors(), {})
    assert CheckpointStore(small_disk, read_only=True).load_newest().state == {"seen": 1}


def write_for_ever(folder: str, finished: Connection) -> None:
    store = CheckpointStore(folder, keep_last=2)
    newest = store.load_newest()
    step = newest.position.step if newest else 0
    while True:
        step += 1
        weights = torch.full((50_000,), float(step))
        store.save((0, step), {"w": weights}, {"step": step}, is_best=step % 7 == 0)
        finished.send(step)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_while_writing(tmp_path, kills):
    """At whatever moment the writer dies, the last checkpoint that it finished is there, or the next one."""
    context = quick_start()
    generator = random.Random(0)
    for _ in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(target=write_for_ever, args=(str(tmp_path), sender))
        writer.start()
        sender.close()
        last = receiver.recv()
        time.sleep(generator.uniform(0, 0.15))
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                last = receiver.recv()
        loaded = CheckpointStore(tmp_path, read_only=True).load_newest()
        assert loaded.state["step"] in (last, last + 1)
        assert torch.equal(loaded.tensors["w"], torch.full((50_000,), float(loaded.state["step"])))


def sharded_checkpoint(folder: Path) -> tuple[CheckpointStore, Path]:
    store, rows = CheckpointStore(folder), torch.arange(10.0).view(5, 2)
    shards = [(0, 2, {"table": rows[:2]}), (2, 5, {"table": rows[2:]})]
    return store, store.save((1, 2), {"own": torch.ones(1)}, {}, shards=shards)


def test_rows_of_shards_are_joined_or_read_by_range(tmp_path: Path) -> None:
    store, path = sharded_checkpoint(tmp_path)
    assert {each.name for each in path.glob("rows*")} == {"rows-1-of-2.safetensors", "rows-2-of-2.safetensors"}
    assert torch.equal(store.load(path).tensors["table"], torch.arange(10.0).view(5, 2))
    apart = CheckpointStore(tmp_path, joins_rows=False).load(path)
    assert apart.tensors.keys() == {"own"} and apart.row_shapes == {"table": (torch.float32, [5, 2])}
    assert apart.rows is not None
    for first, stop in ((0, 5), (1, 4), (0, 2), (3, 3)):
        assert torch.equal(apart.rows.read("table", first, stop), torch.arange(10.0).view(5, 2)[first:stop])


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_shard_is_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    store, path = sharded_checkpoint(tmp_path)
    file = path / "rows-2-of-2.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedCheckpoint, match="rows-2-of-2.safetensors"):
        store.load(path)


@pytest.mark.parametrize("bounds", [(0, 2, 3, 5), (0, 2, 1, 4), (1, 3, 3, 6)])
def test_shards_that_are_no_whole_table_are_refused(tmp_path: Path, bounds: tuple[int, ...]) -> None:
    store, rows = CheckpointStore(tmp_path), torch.zeros(6, 2)
    shards = [(a, b, {"table": rows[a:b]}) for a, b in (bounds[:2], bounds[2:])]
    with pytest.raises(UserError, match="rows of a whole table"):
        store.load(store.save((1, 2), {}, {}, shards=shards))


def test_shards_of_other_widths_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    shards = [(0, 2, {"table": torch.zeros(2, 2)}), (2, 5, {"table": torch.zeros(3, 3)})]
    path = store.save((1, 2), {}, {}, shards=shards)
    with pytest.raises(UserError, match="rows 2 to 5"):
        store.load(path)
