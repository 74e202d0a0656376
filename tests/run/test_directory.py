"""Run folders: resuming, locks, unsafe links, and disks that fail."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from disks import disk
from generative_recommenders.errors import UserError
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.training.state import check_same_data
from programs import quick_start


def records(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def test_new_folders_are_named_by_time_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [RunFolder.create_or_open(None, name="ml") for _ in range(3)]
    paths = {run.path.absolute() for run in runs}
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


def test_tensorboard_hides_the_steps_after_the_checkpoint(tmp_path):
    with RunFolder.create_or_open(tmp_path) as run:
        for step in range(1, 6):
            run.write_scalars(step, {"train/loss": 1.0})
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(3)
        run.write_scalars(4, {"train/loss": 2.0})
    events = EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def record_epoch(run: RunFolder, step: int, loss: float) -> None:
    """What a run writes at the last step of epoch 1, as its log does."""
    run.write_scalars(step, {"train/loss": loss})
    run.write_metrics(step, {"train/loss": loss})
    record_epoch_end(run, step, loss)


def record_epoch_end(run: RunFolder, step: int, loss: float) -> None:
    run.write_scalars(step, {"validation/mrr": loss, "train/epoch_loss": loss})
    run.write_metrics(step, {"part": "validation", "epoch": 1, "train_loss": loss, "mrr": loss})


def scalars(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run.tensorboard)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_of_a_run_resumed_within_the_same_second_are_read_in_order(tmp_path):
    """TensorBoard numbers its files within a second, and the tenth comes before the ninth by name."""
    for step in range(12):
        with RunFolder.create_or_open(tmp_path, resume=step > 0) as run:
            if step:
                run.truncate_after(step - 1)
            run.write_scalars(step, {"train/loss": float(step)})
            run.write_scalars(step + 1, {"train/loss": -1.0})
    assert scalars(run) == {"train/loss": [*((step, float(step)) for step in range(12)), (12, -1.0)]}


@pytest.mark.parametrize("killed_between", [False, True])
def test_an_epoch_is_recorded_once_after_a_checkpoint_on_its_last_step(tmp_path, killed_between):
    """The checkpoint is of step 4, before epoch 1 was scored; the kill came while it was recorded, or later."""
    with RunFolder.create_or_open(tmp_path) as run:
        run.write_scalars(3, {"train/loss": 3.0})
        run.write_metrics(3, {"train/loss": 3.0})
        record_epoch(run, 4, 4.0)
    if killed_between:
        lines = run.metrics_path.read_bytes().splitlines(keepends=True)
        run.metrics_path.write_bytes(b"".join(lines[:-1]))
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(4, epoch=1)
        assert [(each["step"], "epoch" in each) for each in records(run)] == [(3, False), (4, False)]
        record_epoch_end(run, 4, 5.0)
        assert [each["mrr"] for each in records(run) if "epoch" in each] == [5.0]
    assert scalars(run) == {
        "train/loss": [(3, 3.0), (4, 4.0)],
        "validation/mrr": [(4, 5.0)],
        "train/epoch_loss": [(4, 5.0)],
    }


def test_the_record_of_an_epoch_before_the_checkpoint_stays(tmp_path):
    """The checkpoint is of step 4 and epoch 2, which is to begin."""
    with RunFolder.create_or_open(tmp_path) as run:
        record_epoch(run, 4, 4.0)
        run.write_scalars(5, {"train/loss": 5.0})
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(4, epoch=2)
        assert [each.get("epoch") for each in records(run)] == [None, 1]
        run.write_scalars(5, {"train/loss": 6.0})
    found = scalars(run)
    assert found["validation/mrr"] == [(4, 4.0)] and found["train/loss"] == [(4, 4.0), (5, 6.0)]


LINKED = [
    "run.lock", "metrics.jsonl", "train.log", "resolved.gin", "curves.png", "report.html", "report", "checkpoints",
    "tensorboard",
]  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("exists", [True, False])
def test_links_to_files_elsewhere_are_refused(tmp_path, name, resume, exists):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    (run / name).symlink_to(outside)
    if exists:
        outside.write_text("precious" if resume or name != "metrics.jsonl" else "")
    before = outside.read_text() if exists else None
    with pytest.raises(UserError, match=f"{name} is a symbolic link") as caught:
        RunFolder.create_or_open(run, resume=resume)
    assert "\n" not in str(caught.value)
    assert (outside.read_text() if outside.exists() else None) == before
    assert sorted(path.name for path in run.iterdir()) == [name]


def test_a_link_made_at_the_last_moment_is_not_followed(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    for name in LINKED[:3]:
        run = tmp_path / f"run {name}"
        run.mkdir()
        (run / name).symlink_to(outside)
        with pytest.raises(UserError, match="cannot write to run folder"):
            RunFolder.create_or_open(run, resume=True)
    assert outside.read_text() == "precious"


def test_a_link_in_place_of_a_half_written_file_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    with RunFolder.create_or_open(tmp_path / "run") as run:
        for name in (".resolved.gin.writing", ".metrics.jsonl.writing"):
            (run.path / name).symlink_to(outside)
        assert run.save_resolved_gin("a = 1\n").read_text() == "a = 1\n"
        run.truncate_after(0)
    assert outside.read_text() == "precious"


def test_a_link_made_while_the_folder_is_open_is_replaced(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    with RunFolder.create_or_open(tmp_path / "run") as run:
        (run.path / "resolved.gin").symlink_to(outside)
        assert run.save_resolved_gin("a = 1\n").read_text() == "a = 1\n"
    assert outside.read_text() == "precious" and not (run.path / "resolved.gin").is_symlink()


def test_a_folder_that_was_deleted_meanwhile_is_not_made_again(tmp_path):
    with RunFolder.create_or_open(tmp_path / "run") as run:
        shutil.rmtree(run.path)
        with pytest.raises(UserError, match="cannot write to run folder .*run: No such file"):
            run.save_resolved_gin("a = 1\n")
    assert not run.path.exists()


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
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{"step": 2}\n{"step": 1e999}\n{"step": 3}\n')
    with RunFolder.create_or_open(tmp_path, resume=True) as run:
        run.truncate_after(3)
        assert records(run) == [{"step": 1}, {"step": 3}]


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


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "read_only"
    if os.geteuid():
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)
    else:
        with disk(folder, "ro,size=64k"):
            yield folder


def test_a_full_disk_reports_one_line_error(small_disk, capfd):
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
def test_read_only_folder_reports_one_line_error(read_only: Path, name, monkeypatch):
    monkeypatch.chdir(read_only)
    path = None if name is None else read_only / name
    with pytest.raises(UserError, match=r"cannot write to run folder .*--run_dir") as caught:
        RunFolder.create_or_open(path)
    assert "\n" not in str(caught.value)


def test_changed_data_is_refused():
    check_same_data("abc", "abc")
    with pytest.raises(UserError, match="abc then, abd now"):
        check_same_data("abc", "abd")
