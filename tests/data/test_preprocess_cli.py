"""The program ``preprocess_public_data.py`` from its command line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from generative_recommenders.data.sequence_dataset import SequenceDataset

PROGRAM = Path(__file__).resolve().parents[2] / "preprocess_public_data.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *flags], capture_output=True, text=True, check=False, timeout=120
    )


def test_prepares_exports_and_imports(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("who,what,when\nu,a,1\nu,b,2\nv,a,3\n")
    csv = [
        "--dataset=csv",
        f"--raw_path={tmp_path / 'r.csv'}",
        "--columns=who,what",
        "--name=mine",
        f"--data_root={tmp_path}",
    ]
    done = run(*csv, f"--export_text={tmp_path / 'text.csv'}")
    assert done.returncode == 0, done.stderr
    dataset = SequenceDataset.open(tmp_path / "prepared" / "mine")
    assert dataset.timestamps is None
    assert dataset.manifest.data_hash in done.stdout
    assert "split hash, leave_one_out" in done.stdout
    again = run(
        "--dataset=exchange-text",
        f"--raw_path={tmp_path / 'text.csv'}",
        "--name=back",
        f"--data_root={tmp_path}",
    )
    assert again.returncode == 0, again.stderr
    assert SequenceDataset.open(tmp_path / "prepared" / "back").items.tolist() == dataset.items.tolist()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("u,a,1,1\nu,a,1,-5\n")
    done = run(
        "--dataset=csv", f"--raw_path={tmp_path / 'r.csv'}", "--name=mine", f"--data_root={tmp_path / 'd'}"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.splitlines()[-1] == f"error: {tmp_path / 'r.csv'}, line 2: the timestamp '-5' is negative"
    )
    assert not list((tmp_path / "d").rglob("*.bin"))
    assert [p.name for p in (tmp_path / "d" / "prepared").iterdir()] == []


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--dataset=exchange-text"], "needs --raw_path"),
        (["--memory_limit=lots"], "is not a size"),
        (["--prepared=x"], "needs --export_text"),
        (["--dataset=nothing"], "unknown dataset 'nothing'"),
    ],
)
def test_bad_flags(
    tmp_path: Path,
    flags: list[str],
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from absl import flags as absl_flags

    import preprocess_public_data

    saved = absl_flags.FLAGS.flag_values_dict()
    monkeypatch.setattr("signal.signal", lambda *_: None)
    absl_flags.FLAGS(["program", f"--data_root={tmp_path}", *flags])
    try:
        with pytest.raises(SystemExit) as stopped:
            preprocess_public_data.main(["program"])
    finally:
        for name in ("dataset", "memory_limit", "prepared", "data_root"):
            setattr(absl_flags.FLAGS, name, saved[name])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert what in errors[0]


@pytest.mark.slow
def test_killed_at_any_moment_the_target_is_whole_or_absent(tmp_path: Path) -> None:
    """kill -9 and SIGTERM at random moments; the next run ends well and leaves nothing beside the folder."""
    rng = random.Random(1)
    (tmp_path / "r.csv").write_text("".join(f"u{i % 9_973},i{i % 997},{i % 5},{i}\n" for i in range(400_000)))
    command = [
        sys.executable,
        str(PROGRAM),
        "--dataset=csv",
        f"--raw_path={tmp_path / 'r.csv'}",
        "--name=mine",
    ]
    command.append(f"--data_root={tmp_path}")
    target = tmp_path / "prepared" / "mine"
    for _ in range(int(os.environ.get("KILLS", "50"))):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 6))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        if target.exists():
            SequenceDataset.open(target).verify()
    subprocess.run(command, check=True, capture_output=True)
    SequenceDataset.open(target).verify()
    assert [p.name for p in target.parent.iterdir()] == ["mine"]
