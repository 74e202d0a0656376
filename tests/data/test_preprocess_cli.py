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
from absl import flags as absl_flags
from absl.testing import flagsaver

from generative_recommenders.commands import preprocess
from generative_recommenders.commands.program import exit_code
from generative_recommenders.data.store import SequenceDataset
from programs import run_program

PROGRAM = Path(__file__).resolve().parents[2] / "preprocess_public_data.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_program(PROGRAM.name, *flags)


def test_prepares_exports_and_imports(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("who,what,when\nu,a,1\nu,b,2\nv,a,3\n")
    csv = [
        "--dataset=csv",
        f"--raw_path={tmp_path / 'r.csv'}",
        "--columns=user=who,item=what",
        "--name=mine",
        f"--data_root={tmp_path}",
    ]
    done = run(*csv, f"--export_text={tmp_path / 'text.csv'}")
    assert done.returncode == 0, done.stderr
    dataset = SequenceDataset.open(tmp_path / "prepared" / "mine")
    assert dataset.timestamps is None
    assert dataset.manifest.data_hash in done.stdout
    assert "split hash, leave_one_out:" in done.stdout
    assert all(text in done.stdout for text in dataset.manifest.split_hashes.values())
    again = run(
        "--dataset=exchange-text",
        f"--raw_path={tmp_path / 'text.csv'}",
        "--name=back",
        f"--data_root={tmp_path}",
    )
    assert again.returncode == 0, again.stderr
    assert SequenceDataset.open(tmp_path / "prepared" / "back").items.tolist() == dataset.items.tolist()


def test_a_source_keeps_its_own_choices_unless_flags_are_given(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(
        "from generative_recommenders import register_data_source\n"
        "from generative_recommenders.data.readers.events import RawRatings\n\n\n"
        '@register_data_source("once", gin_name="once_source")\n'
        "def once(request):\n"
        '    return RawRatings(request.name, [request.raw_path], tie_order="random", duplicates="drop")\n'
    )
    (tmp_path / "r.csv").write_text("user_id,item_id,timestamp\nu,a,1\nu,a,1\nu,b,2\n")
    source = [f"--plugin={tmp_path / 'once.py'}", "--dataset=once", f"--raw_path={tmp_path / 'r.csv'}"]
    for flags, choices, events in (
        ([], {"tie_order": "random", "duplicates": "drop"}, 2),
        (["--tie_order=file", "--duplicates=keep"], {"tie_order": "file", "duplicates": "keep"}, 3),
    ):
        done = run(*source, *flags, f"--data_root={tmp_path}")
        assert done.returncode == 0, done.stderr
        dataset = SequenceDataset.open(tmp_path / "prepared" / "once")
        assert (dataset.manifest.choices, dataset.num_events) == (choices, events)


def test_exchange_files_in_milliseconds(tmp_path: Path) -> None:
    header = "index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps"
    (tmp_path / "text.csv").write_text(f'{header}\n0,7,"1,2","5,4","1600000000000,1600000600000"\n')
    flags = ["--dataset=exchange-text", f"--raw_path={tmp_path / 'text.csv'}", "--name=ms", f"--data_root={tmp_path}"]
    assert "give its unit with --time_unit" in run(*flags).stderr
    assert run(*flags, "--time_unit=ms").returncode == 0
    dataset = SequenceDataset.open(tmp_path / "prepared" / "ms")
    assert dataset.timestamps.tolist() == [1_600_000_000, 1_600_000_600]


def test_bad_input_reports_one_line_error_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("u,a,1,1\nu,a,1,-5\n")
    done = run(
        "--dataset=csv",
        f"--raw_path={tmp_path / 'r.csv'}",
        "--columns=user,item,rating,timestamp",
        "--name=mine",
        f"--data_root={tmp_path / 'd'}",
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'r.csv'}, line 2: the timestamp '-5' is before 1970"
    assert not list((tmp_path / "d").rglob("*.bin"))
    assert [p.name for p in (tmp_path / "d" / "prepared").iterdir()] == []


@pytest.mark.parametrize("flag", ["--k_core=abc", "--engine=flink", "--predictability=x", "--colums=a,b"])
def test_a_flag_that_cannot_be_read_reports_one_line_error(flag: str) -> None:
    done = run(flag)
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ") and flag.lstrip("-").split("=", maxsplit=1)[0] in errors[0]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--dataset=exchange-text"], "needs --raw_path"),
        (["--memory_limit=lots"], "is not a size"),
        (["--prepared=x"], "needs --export_text=FILE, --export_parquet=FILE or --audit"),
        (["--audit"], "--audit needs --prepared=NAME"),
        (["--prepared=x", "--export_text=y", "--output=z"], "--output needs --audit"),
        (["--prepared=nothing", "--audit"], "nothing is not prepared in data/prepared/nothing; prepared: "),
        (["--prepared=nothing", "--audit"], "--dataset=csv --raw_path=FILE --name=nothing"),
        (["--prepared=ml-1m", "--data_root=no/where", "--audit"], "--dataset=ml-1m --data_root=no/where"),
        (["--dataset=csv", "--tie_order=random", "--prepared=x"], "--dataset has no meaning with --prepared"),
        (["--prepared=x", "--export_text=y", "--k_core=5"], "--k_core has no meaning with --prepared"),
        (["--dataset=nothing"], "unknown data source 'nothing'"),
        (["--dataset=exchange-text", "--columns=foo"], "--columns is for --dataset=csv"),
        (["--dataset=exchange-text", "--delimiter=;"], "--delimiter is for --dataset=csv"),
        (["--dataset=csv", "--raw_path=.", "--delimiter=comma"], "--delimiter='comma' is not a delimiter"),
        (["--dataset=ml-1m", "--synthetic_users=9"], "--synthetic_users is for --dataset=synthetic-books"),
        (["--dataset=csv", "--predictability=0.5"], "--predictability is for --dataset=synthetic-books"),
        (["--dataset=csv", "--synthetic_min_length=1"], "--synthetic_min_length is for --dataset=synthetic-books"),
        (["--dataset=csv", "--synthetic_mean_length=2"], "--synthetic_mean_length is for --dataset=synthetic-books"),
        (["--engine=spark", "--memory_limit=1GB"], "--memory_limit has no meaning with --engine=spark"),
        (["--spark_master=local"], "--spark_master needs --engine=spark"),
        (["--export_text="], "--export_text=: not the name of a file; name the file to write"),
        (["--export_text=."], "--export_text=.: not the name of a file"),
        (["--export_parquet=.."], "--export_parquet=..: not the name of a file"),
        (["--export_text=/etc/passwd/x"], "--export_text=/etc/passwd/x: /etc/passwd is not a folder; name"),
        (["--export_parquet=" + "n" * 250], ": cannot be written: File name too long"),
        (["--prepared=x", "--export_parquet=/etc"], "--export_parquet=/etc: not the name of a file"),
        (["--dataset=csv", "--raw_path=" + "n" * 300], "does not exist"),
        (
            ["--dataset=csv", "--raw_path=r.csv", "--export_text=./r.csv"],
            "--export_text=./r.csv is the file of --raw_path",
        ),
        (["--export_text=a", "--export_parquet=a"], "--export_parquet=a is the file of --export_text: name another"),
        (["--export_text=/dev/null"], "--export_text=/dev/null: a device or a pipe"),
        (["--dataset=ml-1m", "--time_unit=ms"], "--time_unit is for --dataset=csv or exchange-text, and this is ml-1m"),
    ],
)
def test_bad_flags(
    flags: list[str], what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
        absl_flags.FLAGS(["program", *flags])
        sys.exit(exit_code(lambda: preprocess.run([])))
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert what in errors[0]


@pytest.mark.parametrize("closed", [(0, 1), (2,)])
def test_a_closed_standard_stream_changes_nothing(tmp_path: Path, closed: tuple[int, ...]) -> None:
    (tmp_path / "r.csv").write_text("user,item\nu,a\nu,b\n")
    flags = [f"--raw_path={tmp_path / 'r.csv'}", "--name=mine", f"--data_root={tmp_path}"]
    command = [sys.executable, str(PROGRAM), "--dataset=csv", *flags]
    done = subprocess.run(
        command, preexec_fn=lambda: [os.close(each) for each in closed], capture_output=True, check=False
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    SequenceDataset.open(tmp_path / "prepared" / "mine").verify()


def test_a_link_to_a_folder_keeps_leading_there(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("user,item\nu,a\nu,b\n")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "prepared" / "mine").symlink_to(tmp_path / "elsewhere")
    done = run("--dataset=csv", f"--raw_path={tmp_path / 'r.csv'}", "--name=mine", f"--data_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["mine"]
    assert (tmp_path / "prepared" / "mine").is_symlink()
    SequenceDataset.open(tmp_path / "elsewhere").verify()


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
