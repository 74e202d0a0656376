"""Faults of whole runs: killed at any moment, disk or memory full, input wrong; progress is never lost."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faulty_runs import (
    CONFIG,
    ROOT,
    Kill,
    armed_worker,
    assert_same_run,
    log_of,
    options_of,
    records,
    run_alone,
    run_two,
    run_with_kills,
)
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands import setup
from generative_recommenders.commands.evaluate import evaluate_worker
from generative_recommenders.commands.setup import Options
from generative_recommenders.commands.train import train_worker
from generative_recommenders.config.gin import load_settings
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed import launch as launching
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.launch import launch
from generative_recommenders.training.debug import NonFiniteError
from generative_recommenders.training.trainer import Trainer
from launching import free_port, launch_quickly
from programs import quick_start
from tiny_data import ragged_sequences, tiny_dataset


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    (root / "prepared").mkdir()
    tiny_dataset(root / "prepared", ragged_sequences(57, 30, seed=5))
    (root / "x.gin").write_text(CONFIG)
    return root


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_alone(options_of(data_root, run)) == 0, log_of(run)
    return run


@pytest.fixture(scope="module")
def whole_of_two(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    assert run_two(options_of(data_root, run)) == 0
    return run


@pytest.fixture(scope="module")
def killed(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that was killed in its last epoch, with three checkpoints by then."""
    run = tmp_path_factory.mktemp("killed") / "run"
    assert run_alone(options_of(data_root, run), Kill("training.trainer.Trainer.run_step", 23, True)) == -signal.SIGKILL
    return run


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_nothing_had_been(data_root: Path, tmp_path: Path, whole: Path, count: int) -> None:
    run_with_kills(run_alone, data_root, tmp_path, whole, count, 1)


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_of_two_processes(data_root: Path, tmp_path: Path, whole_of_two: Path, count: int) -> None:
    run_with_kills(run_two, data_root, tmp_path, whole_of_two, count, 2)


def test_a_killed_run_that_detects_replaced_items(data_root: Path, tmp_path: Path) -> None:
    """The objective with weights of its own; others resume in `tests/training/test_restore.py`."""
    bindings = ('train_fn.objective = "replaced"', "train_fn.dropout_rate = 0.2", "train_fn.num_epochs = 2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_alone(options_of(data_root, whole, *bindings)) == 0, log_of(whole)
    kill = Kill("training.trainer.Trainer.run_step", 11, True)
    assert run_alone(options_of(data_root, run, *bindings), kill) == -signal.SIGKILL
    assert run_alone(options_of(data_root, run, *bindings)) == 0, log_of(run)
    assert_same_run(run, whole)


def test_a_killed_run_with_a_sharded_item_table(data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "prepared").symlink_to(data_root / "prepared")
    sharded = 'train_fn.item_table = "sharded"\ntrain_fn.optimizer = "rowwise_adagrad"\n'
    (root / "x.gin").write_text(CONFIG.replace("num_epochs = 4", "num_epochs = 2") + sharded)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_two(options_of(root, whole)) == 0
    assert list(whole.glob("checkpoints/*/rows-2-of-2.safetensors"))
    between_shards = Kill("checkpoint.store.write_tensors", 5, after=False)
    # The main process alone writes checkpoints.
    in_a_step_of_the_other = Kill("training.trainer.Trainer.run_step", 3, after=True, rank=1)
    for kill in (between_shards, in_a_step_of_the_other):
        assert run_two(options_of(root, run), kill) == 1
    assert run_two(options_of(root, run)) == 0
    assert_same_run(run, whole)
    options = dataclasses.replace(options_of(root, run), gin_files=())
    assert launch(evaluate_worker, (options,), 2, 0, device_type="cpu") == 0
    scored = json.loads((run / "evaluation.json").read_text())["results"]
    assert scored == records(run)[-1]["results"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_after_a_checkpoint_within_an_epoch(
    data_root: Path, tmp_path: Path, whole: Path, whole_of_two: Path, world: int
) -> None:
    """The checkpoint is of step 5, which ends no epoch; the kill comes two steps later."""
    start, expected = (run_alone, whole) if world == 1 else (run_two, whole_of_two)
    run = tmp_path / "run"
    assert start(dataclasses.replace(options_of(data_root, run), max_steps=5)) == 0
    newest = CheckpointStore(run / "checkpoints", read_only=True).load_newest()
    assert newest is not None and newest.state["progress"]["step_in_epoch"] > 0
    assert start(options_of(data_root, run), Kill("training.trainer.Trainer.run_step", 2, True)) != 0
    assert start(options_of(data_root, run)) == 0
    assert_same_run(run, expected)


def test_a_run_that_is_started_again_resumes(data_root: Path, tmp_path: Path, whole: Path) -> None:
    """By one and the same command: without a folder, without a checkpoint, and from the newest one."""
    options = dataclasses.replace(options_of(data_root, tmp_path / "run"), auto_resume=True)
    for call in (3, 14):
        assert run_alone(options, Kill("training.trainer.Trainer.run_step", call, True)) == -signal.SIGKILL
    assert run_alone(options) == 0, log_of(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_that_is_resumed_changes_nothing(data_root: Path, tmp_path: Path, whole: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert run_alone(options_of(data_root, run)) == 0, log_of(run)
    found, expected = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (run, whole)
    )
    for name in ("train.log", "run.lock"):
        del found[Path(name)], expected[Path(name)]
    assert found == expected
    assert "test, full catalogue" in log_of(run)


def test_a_damaged_newest_checkpoint_is_passed_over(data_root: Path, killed: Path, tmp_path: Path, whole: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = CheckpointStore(run / "checkpoints", read_only=True).paths()[-1]
    with open(newest / "tensors.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"?")
    assert run_alone(options_of(data_root, run)) == 0, log_of(run)
    assert f"damaged checkpoint {newest}" in log_of(run) and "the checkpoint before it is used" in log_of(run)
    assert_same_run(run, whole)


def test_at_another_number_of_processes(data_root: Path, killed: Path, tmp_path: Path) -> None:
    """Two processes resume a run of one, at its global batch, from where it was; without dropout, which differs."""
    run, alone = (Path(shutil.copytree(killed, tmp_path / name)) for name in ("run", "alone"))
    without = ("train_fn.dropout_rate = 0.0", "sasrec_encoder.ffn_dropout_rate = 0.0")
    assert run_two(options_of(data_root, run, *without, "train_fn.local_batch_size = 4")) == 0
    assert run_alone(options_of(data_root, alone, *without)) == 0, log_of(alone)
    assert "resuming a run of 1 processes on 2" in (run / "train.log").read_text()
    found, expected = records(run), records(alone)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    losses = [[line["train_loss"] for line in lines if "train_loss" in line] for lines in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_changed_data_are_refused(data_root: Path, killed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    other = tmp_path / "other"
    (other / "prepared").mkdir(parents=True)
    tiny_dataset(other / "prepared", ragged_sequences(57, 30, seed=6))
    shutil.copy(data_root / "x.gin", other)
    before = records(run)
    assert run_alone(options_of(other, run)) == 2
    assert "the prepared data changed since this run began" in log_of(run).splitlines()[-1]
    assert records(run) == before


def test_clocks_that_jump_change_nothing(data_root: Path, killed: Path, tmp_path: Path, whole: Path) -> None:
    """The wall clock goes back by a day between the parts of a run; the newest stays the newest."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    for path in (run / "checkpoints").rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert run_alone(options_of(data_root, run)) == 0, log_of(run)
    assert_same_run(run, whole)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    data_root: Path, killed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    store = CheckpointStore(run / "checkpoints", read_only=True)
    before = store.paths()
    assert run_alone(options_of(data_root, run, "train_fn.learning_rate = 1e29")) == 3
    line = log_of(run).splitlines()[-1]
    assert line.startswith("error: the loss is nan at step") and "not finite" in line
    assert store.paths() == before
    newest = store.load_newest()
    assert newest is not None and all(x.isfinite().all() for x in newest.tensors.values() if x.is_floating_point())


@pytest.mark.parametrize("part", ["items.table", "sequence"])
def test_weights_that_are_not_finite_are_never_saved(data_root: Path, tmp_path: Path, part: str) -> None:
    """The last update of an epoch may spoil them after its loss was finite."""
    dataset = SequenceDataset.open(data_root / "prepared" / "tiny")
    settings = load_settings([data_root / "x.gin"])
    trainer = Trainer(settings, dataset, make_split(dataset), Collectives("cpu"))
    store = CheckpointStore(tmp_path)
    name, spoilt = next(each for each in trainer.model.named_parameters() if each[0].startswith(part))

    def spoil() -> None:
        if trainer.progress.step == 2 * len(trainer.loader):
            spoilt.data.view(-1)[0] = float("inf")

    with pytest.raises(NonFiniteError, match=f"{name} is not finite after step"):
        trainer.train(store, on_step=spoil)
    assert [store.load(path).position.epoch for path in store.paths()] == [1]
    assert len(trainer.progress.history) == 1


def limited(rank: int, world_size: int, options: Options) -> int:
    torch.set_num_threads(1)
    if rank == 1:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (300 << 20),) * 2)
    return train_worker(rank, world_size, options)


def test_a_worker_out_of_memory_reports_one_line_error(
    data_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_quickly(monkeypatch)
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    large = ("sasrec_encoder.ffn_hidden_dim = 65536", "sasrec_encoder.num_blocks = 40")
    options = options_of(data_root, tmp_path / "run", *large)
    assert launch(limited, (options,), 2, 0, device_type="cpu") == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("rank 1 failed") and "out of memory" in line and "local_batch_size" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_it_resumes_later(
    data_root: Path, killed: Path, tmp_path: Path, small_disk: Path, whole: Path
) -> None:
    run = Path(shutil.copytree(killed, small_disk / "run"))
    Path(f"{run}.log").symlink_to(tmp_path / "log")
    free = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))
    assert run_alone(options_of(data_root, run)) == 2
    line = log_of(run).splitlines()[-1]
    assert line.startswith("error: ") and "No space left on device" in line and "Traceback" not in log_of(run)
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert run_alone(options_of(data_root, run)) == 0, log_of(run)
    assert_same_run(run, whole)


def test_a_read_only_run_folder_reports_one_line_error(data_root: Path, tmp_path: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    Path(f"{run}.log").symlink_to(tmp_path / "log")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run_alone(options_of(data_root, run)) == 2
    line = log_of(run).splitlines()[-1]
    assert line.startswith("error: cannot write to run folder") and "--run_dir" in line
    assert "Traceback" not in log_of(run)


def prepare_tiny(folder: str) -> None:
    tiny_dataset(Path(folder), ragged_sequences(57, 30, seed=5))


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_preparation_leaves_a_whole_folder_or_none(tmp_path: Path, data_root: Path, count: int) -> None:
    expected = SequenceDataset.open(data_root / "prepared" / "tiny").manifest.data_hash
    context, generator = quick_start(), random.Random(0)
    for _ in range(count):
        process = context.Process(target=prepare_tiny, args=(str(tmp_path),))
        process.start()
        time.sleep(generator.uniform(0.0, 0.4))
        process.kill()
        process.join()
        if (tmp_path / "tiny").exists():
            dataset = SequenceDataset.open(tmp_path / "tiny")
            dataset.verify()
            assert dataset.manifest.data_hash == expected
    prepare_tiny(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_torchrun_starts_main(data_root: Path, tmp_path: Path, whole_of_two: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    config = [f"--gin_config_file={data_root / 'x.gin'}", f"--data_root={data_root}", f"--run_dir={run}", "--noreport"]
    command = [*torchrun, "main.py", *config]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("epoch 4/4") == 1  # lines are logged once
    assert "find_unused_parameters" not in done.stderr
    assert_same_run(run, whole_of_two)


def task_of_slurm(options: Options, rank: int, port: int) -> None:
    os.environ.update(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os._exit(launch(armed_worker, (options, None), None, device_type="cpu"))


def test_tasks_of_slurm_train_as_two_processes(data_root: Path, tmp_path: Path, whole_of_two: Path) -> None:
    run, port = tmp_path / "run", free_port()
    tasks = [
        quick_start().Process(target=task_of_slurm, args=(options_of(data_root, run), rank, port)) for rank in (0, 1)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(120)
    assert [task.exitcode for task in tasks] == [0, 0]
    assert_same_run(run, whole_of_two)


def on_own_disk(rank: int, world_size: int, options: Options, kill: Kill | None, folder: str) -> int:
    """A member of a run whose folder is a relative path, so that it is another one for each member."""
    disk = Path(folder) / f"host{rank}"
    disk.mkdir(exist_ok=True)
    os.chdir(disk)
    return armed_worker(rank, world_size, options, kill)


def test_hosts_without_a_shared_disk(
    data_root: Path, tmp_path: Path, whole_of_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process reads the checkpoints for all: on resume, and the best one at the end."""
    launch_quickly(monkeypatch)
    config = (str(data_root / "x.gin"),)
    for resume, kill in ((False, Kill("training.trainer.Trainer.run_step", 10, True)), (True, None)):
        options = Options(config, (), data_root, "run", resume, None, False, report=False)
        code = launch(on_own_disk, (options, kill, str(tmp_path)), 2, 0, device_type="cpu")
        assert code == (0 if resume else 1)
    log = (tmp_path / "host0" / "run" / "train.log").read_text()
    assert "ERROR rank 0 failed: it was killed by SIGKILL" in log
    assert_same_run(tmp_path / "host0" / "run", whole_of_two)
    assert list((tmp_path / "host1").iterdir()) == []


def each_its_own(rank: int, world_size: int, options: list[Options]) -> int:
    return armed_worker(rank, world_size, options[rank], None)


@pytest.mark.parametrize("what", ["settings", "data", "max_steps"])
def test_processes_with_different_input_are_refused(
    data_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    launch_quickly(monkeypatch)
    own = options_of(data_root, tmp_path / "run")
    if what == "settings":
        other = options_of(data_root, tmp_path / "run", "train_fn.learning_rate = 0.5")
        words = "rank 1 of 2 has train_fn.learning_rate = 0.5, rank 0 has 0.001"
    elif what == "data":
        (tmp_path / "prepared").mkdir()
        tiny_dataset(tmp_path / "prepared", ragged_sequences(57, 30, seed=6))
        other = dataclasses.replace(own, data_root=tmp_path)
        words = "rank 1 of 2 has other prepared data than rank 0"
    else:
        other, words = dataclasses.replace(own, max_steps=3), "rank 1 of 2 has --max_steps=3, rank 0 has None"
    assert launch(each_its_own, ([own, other],), 2, 0, device_type="cpu") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "run").exists()


def make_embedded(folder: str, calls: str) -> None:
    small = SyntheticBooksSettings(num_users=400, num_items=60)
    setup.resolve = functools.partial(setup.resolve, synthetic=small, progress=False)
    original = setup.prepare

    def counted(*arguments: Any) -> Any:
        with open(calls, "a") as file:
            file.write("made\n")
        return original(*arguments)

    setup.prepare = counted
    setup.prepared_dataset(setup.EMBEDDED, Path(folder))


def test_the_embedded_data_are_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "prepared", ragged_sequences(9, 12, seed=1))
    (tmp_path / "prepared" / "tiny").rename(tmp_path / "prepared" / setup.EMBEDDED)
    (tmp_path / "raw").touch()  # root may write to every folder, but to none below a file
    assert setup.prepared_dataset(setup.EMBEDDED, tmp_path).num_users == 9


def test_processes_that_need_the_embedded_data_at_once_make_them_once(tmp_path: Path) -> None:
    context = quick_start()
    calls = tmp_path / "calls"
    processes = [context.Process(target=make_embedded, args=(str(tmp_path), str(calls))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.read_text() == "made\n"
    names = {path.name for path in (tmp_path / "prepared").iterdir()}
    assert names == {setup.EMBEDDED, f".{setup.EMBEDDED}.lock"}
    assert {path.name for path in (tmp_path / "raw" / setup.EMBEDDED).iterdir()} == {
        "ratings.csv",
        "books.parquet",
        "settings.json",
    }
