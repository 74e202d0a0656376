import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from generative_recommenders.features import UserError
from generative_recommenders.training.run_folder import RunFolder, check_same_data
from generative_recommenders.training.run_log import set_log_level
from programs import quick_start


def records(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def test_new_folders_are_named_by_time_and_never_shared(tmp_path):
    runs = [RunFolder.create_or_open(None, name="ml", root=tmp_path / "runs") for _ in range(3)]
    paths = {run.path for run in runs}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {tmp_path / "runs"}
    assert {path.name.split("-")[2] for path in paths} == {"ml"}
    for run in runs:
        run.close()


def test_metrics_are_there_at_once_one_object_a_line(tmp_path):
    with RunFolder.create_or_open(tmp_path / "run") as run:
        run.write_metrics(1, {"loss": 0.5, "phase": "train"})
        run.write_metrics(2, {"loss": float("nan")})
        assert records(run) == [{"step": 1, "loss": 0.5, "phase": "train"}, {"step": 2, "loss": None}]


def test_resume_repeats_no_step(tmp_path):
    with RunFolder.create_or_open(tmp_path) as run:
        for step in range(1, 6):
            run.write_metrics(step, {"loss": 1.0})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 6, "lo')
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(3)
        run.write_metrics(4, {"loss": 2.0})
        assert [(each["step"], each["loss"]) for each in records(run)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_an_unfinished_line_never_merges_with_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.write_metrics(2, {})
        assert records(run) == [{"step": 1}, {"step": 2}]


def test_tensorboard_hides_the_steps_behind_the_checkpoint(tmp_path):
    with RunFolder.create_or_open(tmp_path) as run:
        for step in range(1, 6):
            run.write_scalars(step, {"train/loss": 1.0})
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(3)
        run.write_scalars(4, {"train/loss": 2.0})
    events = EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2)]


@pytest.mark.parametrize("hours_back", [24, 200_000])
def test_tensorboard_hides_them_where_the_clock_was_put_back(tmp_path, monkeypatch, hours_back):
    real = time.time
    for resumed in range(3):
        seconds = resumed * hours_back * 3600
        monkeypatch.setattr(time, "time", lambda: real() - seconds)  # noqa: B023
        with RunFolder.create_or_open(tmp_path, resume=bool(resumed)) as run:
            if resumed:
                run.truncate_after(3 * resumed)
            for step in range(3 * resumed + 1, 3 * resumed + 6):
                run.write_scalars(step, {"train/loss": float(resumed)})
    events = EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 12))
    assert [event.value for event in events] == [0.0] * 3 + [1.0] * 3 + [2.0] * 5


def test_a_line_that_is_no_text_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n\xff\xfe{"step": 2}\n{"step": 1e999}\n{"step": 3}\n'
    )
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(3)
        assert records(run) == [{"step": 1}, {"step": 3}]


def test_log_lines_go_to_the_file_while_the_run_is_open(tmp_path):
    level = logging.get_verbosity()
    try:
        with RunFolder.create_or_open(tmp_path) as run:
            set_log_level(is_main=True)
            logging.info("first %d", 1)
            logging.warning("second")
            set_log_level(is_main=False)
            logging.warning("said by the main process already")
        logging.error("after the run")
    finally:
        logging.set_verbosity(level)
    lines = (run.path / "train.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["INFO first 1", "WARNING second"]


def test_resolved_gin_is_replaced_whole(tmp_path):
    with RunFolder.create_or_open(tmp_path) as run:
        run.save_resolved_gin("a = 1\nb = 2\n")
        assert run.save_resolved_gin("a = 3\n").read_text() == "a = 3\n"
        assert list(tmp_path.glob(".*")) == []


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    with RunFolder.create_or_open(tmp_path):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()}\b") as caught:
            RunFolder.create_or_open(tmp_path, resume=True)
        assert "\n" not in str(caught.value)
    RunFolder.create_or_open(tmp_path, resume=True).close()


def hold(path: str, held, release) -> None:
    run = RunFolder.create_or_open(path)
    held.set()
    release.wait(30)
    run.close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    context = quick_start()
    held, release = context.Event(), context.Event()
    owner = context.Process(target=hold, args=(str(tmp_path), held, release))
    owner.start()
    assert held.wait(30)
    with pytest.raises(UserError, match=rf"in use by process {owner.pid}\b"):
        RunFolder.create_or_open(tmp_path, resume=True)
    owner.kill()
    owner.join()
    RunFolder.create_or_open(tmp_path, resume=True).close()


def test_a_finished_run_is_not_written_over(tmp_path):
    with RunFolder.create_or_open(tmp_path) as run:
        run.write_metrics(1, {})
    with pytest.raises(UserError, match="--resume"):
        RunFolder.create_or_open(tmp_path)


def test_a_run_that_did_nothing_leaves_its_folder_free(tmp_path):
    with RunFolder.create_or_open(tmp_path) as run:
        run.save_resolved_gin("a = 1\n")
        run.checkpoints.mkdir()
    RunFolder.create_or_open(tmp_path).close()
    (tmp_path / "checkpoints" / "000001-epoch-0-step-3").mkdir()
    with pytest.raises(UserError, match="--resume"):
        RunFolder.create_or_open(tmp_path)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder.create_or_open(tmp_path / "none", resume=True)
    with pytest.raises(UserError, match="--run_dir"):
        RunFolder.create_or_open(None, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to run folder .*Not a directory"):
        RunFolder.create_or_open(tmp_path / "file" / "run")


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "read_only"
    if os.geteuid():
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)
        return
    if not mounted(folder, "ro,size=64k"):
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 KiB."""
    folder = tmp_path / "disk"
    if not mounted(folder, "size=128k"):
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line(small_disk, capfd):
    with RunFolder.create_or_open(small_disk / "run") as run:
        run.write_metrics(1, {"loss": 0.5})
        with contextlib.suppress(OSError):
            (small_disk / "other").write_bytes(bytes(1 << 20))
        with pytest.raises(UserError, match="cannot write to run folder .*No space left on device") as caught:
            for step in range(2, 1000):
                logging.error("a line of the log, %d", step)
                run.write_metrics(step, {"loss": 0.5})
        with pytest.raises(UserError, match="No space left on device"):
            run.save_resolved_gin("a = 1\n" * 10_000)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    (small_disk / "other").unlink()
    with RunFolder.create_or_open(small_disk / "run", resume=True) as run:
        run.truncate_after(1)
        assert records(run) == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize("name", [None, "", "inside"])
def test_read_only_folder_is_one_line(read_only: Path, name):
    path = None if name is None else read_only / name
    with pytest.raises(UserError, match=r"cannot write to run folder .*--run_dir") as caught:
        RunFolder.create_or_open(path, root=read_only)
    assert "\n" not in str(caught.value)


def test_changed_data_is_refused():
    check_same_data("abc", "abc")
    with pytest.raises(UserError, match="abc then, abd now"):
        check_same_data("abc", "abd")
