"""Help, lists and names of the programs, as people ask for them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from generative_recommenders.commands import doctor
from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config.gin import load_settings
from generative_recommenders.config.registry import REGISTRIES
from generative_recommenders.data.preparation.prepare import find_prepared
from generative_recommenders.distributed.signals import INTERRUPTED
from generative_recommenders.errors import UserError
from programs import ROOT, run_program
from tiny_data import ragged_sequences, tiny_dataset

PROGRAMS = ("main.py", "preprocess_public_data.py")


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_examples_and_every_flag(program: str) -> None:
    done = run_program(program, "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"  python {program} " in done.stdout and "\nExamples:\n" in done.stdout
    source = (
        ROOT / "generative_recommenders/commands" / f"{'main' if program == 'main.py' else 'preprocess'}.py"
    ).read_text()
    defined = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)
    assert len(defined) > 20
    for flag in defined:
        assert re.search(rf"^  --(\[no\])?{flag}(=|$)", done.stdout, re.MULTILINE), flag
    assert max(map(len, done.stdout.splitlines())) <= 128
    short = run_program(program, "-h")
    assert (short.returncode, short.stdout) == (0, done.stdout)


def test_help_and_lists_of_names_import_no_torch() -> None:
    for arguments in (["--help"], ["--list=configs"], ["--list=prepared"]):
        done = python("-X", "importtime", "main.py", *arguments)
        assert done.returncode == 0 and done.stdout
        assert not re.search(r"\b(torch|pandas|matplotlib|fbgemm_gpu)$", done.stderr, re.MULTILINE)


def test_preparation_without_arguments_shows_its_help() -> None:
    done = run_program("preprocess_public_data.py")
    assert done.returncode == 0 and done.stdout == run_program("preprocess_public_data.py", "-h").stdout


def test_lists_name_what_there_is(tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "prepared", ragged_sequences(9, 12, seed=1))
    prepared = run_program("main.py", "--list=prepared", f"--data_root={tmp_path}").stdout
    assert re.match(r"tiny  9 users  \d+ items  [\d,]+ events\n$", prepared)
    (tmp_path / "prepared" / "broken").mkdir()
    (tmp_path / "prepared" / "broken" / "manifest.json").write_text("{")
    with_damaged = run_program("main.py", "--list=prepared", f"--data_root={tmp_path}").stdout.splitlines()
    assert "damaged or cut short" in with_damaged[0] and with_damaged[1] == prepared.strip()
    assert "nothing is prepared" in run_program("main.py", "--list=prepared", f"--data_root={tmp_path / 'no'}").stdout
    configs = run_program("main.py", "--list=configs").stdout.splitlines()
    assert all(line.partition("  ")[2].endswith(".") for line in configs), "each with a whole sentence"
    assert {line.split()[0] for line in configs} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.gin")
    }
    register_built_in_parts()
    alone = python("main.py", "--list=losses")  # in a process that has imported nothing yet
    assert alone.stdout == run_program("main.py", "--list=losses").stdout
    for kind, registry in REGISTRIES.items():
        listed = run_program("main.py", f"--list={kind}").stdout.splitlines()
        names = registry.names() if kind == "data_sources" else [part.name for part in registry.parts()]
        own = [name for name in names if registry[name].make.__module__.startswith("generative_recommenders.")]
        # Sorted: parts stand in the order of their modules' imports, which is another one in this process.
        assert sorted(line.split(" (")[0] for line in listed) == sorted(own)


@pytest.mark.parametrize(
    ("program", "flag", "says"),
    [
        (
            "main.py",
            "--list=confgs",
            "unknown --list=confgs; did you mean 'configs'?; known: configs, datasets, ",
        ),
        ("main.py", "--gin_config_file=configs/ml-1m/esasrek.gin", "did you mean configs/ml-1m/esasrec.gin"),
        (
            "main.py",
            "--gin_bindings=train_fn.main_module = 'SASrec'",
            "did you mean 'SASRec'?; known: TwoTower, ",
        ),
        (
            "main.py",
            "--gin_bindings=train_fn.dataset_name = 'there/is/none'",
            "there/is/none is no prepared data set",
        ),
        ("preprocess_public_data.py", "--dataset=ml1m", "did you mean 'ml-1m'?; known: synthetic-books, "),
        ("preprocess_public_data.py", "--colums=user", "Did you mean: columns"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(program: str, flag: str, says: str) -> None:
    done = run_program(program, flag)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line


def test_prepared_data_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_dataset(tmp_path / "prepared", ragged_sequences(9, 12, seed=1))
    tiny_dataset(tmp_path, ragged_sequences(9, 12, seed=1))
    assert find_prepared("tiny", tmp_path) == tmp_path / "prepared" / "tiny"
    assert find_prepared(str(tmp_path / "tiny"), tmp_path) == tmp_path / "tiny"
    monkeypatch.chdir(tmp_path)
    assert find_prepared("tiny", tmp_path / "other") == Path("tiny")
    with pytest.raises(UserError, match="tinny is not prepared in .*; did you mean 'tiny'"):
        find_prepared("tinny", tmp_path)
    out = tmp_path / "out.txt"
    done = run_program("preprocess_public_data.py", f"--prepared={tmp_path / 'tiny'}", f"--export_text={out}")
    assert done.returncode == 0 and out.stat().st_size > 0


def test_a_run_on_prepared_data_by_their_path(tmp_path: Path) -> None:
    tiny_dataset(tmp_path, ragged_sequences(20, 12, seed=1))
    name = f"--gin_bindings=train_fn.dataset_name = '{tmp_path / 'tiny'}'"
    done = run_program("main.py", name, "--max_steps=1", f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "\nSASRec " in run_program("main.py", "--mode=evaluate", f"--run_dir={tmp_path / 'run'}").stdout


def test_configurations_of_the_package_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    register_built_in_parts()
    packaged = load_settings(["configs/ml-1m/esasrec.gin"])
    assert packaged == load_settings([ROOT / "configs/ml-1m/esasrec.gin"])
    (tmp_path / "configs" / "ml-1m").mkdir(parents=True)
    (tmp_path / "configs" / "ml-1m" / "esasrec.gin").write_text("train_fn.num_epochs = 3\n")
    assert load_settings(["configs/ml-1m/esasrec.gin"]).schedule.num_epochs == 3


def test_one_command_for_all_programs(tmp_path: Path) -> None:
    module = ("-m", "generative_recommenders")
    assert "\n  prepare " in python(*module, folder=tmp_path).stdout
    wrong = python(*module, "predct", folder=tmp_path)
    assert wrong.returncode == 2 and "did you mean 'predict'" in wrong.stderr
    shown = python(*module, "evaluate", "--help", folder=tmp_path)
    assert shown.returncode == 0 and "next-item train" in shown.stdout
    for program in ("ablate", "reproduce", "report", "serve", "doctor"):
        shown = run_program("generative_recommenders", program, "--help", folder=tmp_path)
        assert shown.returncode == 0
        assert ("--plugin" in shown.stdout) == (program != "doctor")


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    # As torch does, which hides its own INFO lines at the end of its import alone.
    said = "import atexit, logging\natexit.register(logging.getLogger('torch.x').info, 'cache stats')\n"
    interrupted = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(said + interrupted)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for program in ("ablate a.gin", "reproduce ml-1m", "report run", "serve run", "doctor", "train"):
        command = [sys.executable, "-m", "generative_recommenders", *program.split()]
        if program.split()[0] in ("ablate", "reproduce", "report", "serve"):
            command[2:4] = [f"generative_recommenders.{program.split()[0]}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (INTERRUPTED, "error: interrupted\n"), program
    (tmp_path / "torch.py").rename(tmp_path / "polars.py")
    command = [sys.executable, str(ROOT / "preprocess_public_data.py"), "--dataset=csv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "error: interrupted\n")


def test_closed_standard_streams_change_nothing(tmp_path: Path) -> None:
    for program in ("report", "serve"):
        command = [sys.executable, "-m", f"generative_recommenders.{program}", str(tmp_path)]
        done = subprocess.run(
            command, cwd=ROOT, preexec_fn=lambda: [os.close(0), os.close(1)], stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_log_lines_have_the_time_to_the_second_and_the_level(tmp_path: Path) -> None:
    prepared = run_program("preprocess_public_data.py", "--dataset=synthetic-books", "--synthetic_users=100",
                           "--synthetic_items=50", f"--data_root={tmp_path}")  # fmt: skip
    lines = [line for line in prepared.stderr.splitlines() if " INFO " in line]
    assert lines and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO ", line) for line in lines)


def test_the_doctor_goes_on_where_the_system_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    assert all(math.isnan(each) for each in doctor.memory())


def test_the_doctor_says_what_there_is_and_that_learning_works(tmp_path: Path) -> None:
    done = run_program("generative_recommenders", "doctor", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and lines[-1] == "all is well"
    for topic in (
        "program",
        "python",
        "device",
        "fbgemm",
        "threads",
        "memory",
        "disk",
        "products",
        "self-test",
    ):
        assert any(line.startswith(topic) for line in lines), topic
