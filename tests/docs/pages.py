"""Fenced code blocks of the documentation, and a folder in which they run as in a fresh clone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import programs

ROOT = programs.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL, OUTPUT = ("bash", "sh", "shell"), ("text", "console", "output")
FENCE = re.compile(
    r"^(?:<!-- test: (?P<mark>\w+)[^\n]*-->\n+)?(?P<indent> "
    r"*)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)
FEW_STEPS = ("--max_steps=3", "--noreport")
SHORT = (
    *FEW_STEPS,
    "--gin_bindings=train_fn.num_epochs = 1",
    "--gin_bindings=train_fn.eval_users = 200",
)
"""What makes a training command of a page end in seconds."""


@dataclass(frozen=True)
class Block:
    """One fenced block. mark: "parsed" for what needs an extra, a cluster or a download; "fails" for a command whose
    error stands in the block after it; else None."""

    page: str
    line: int
    language: str
    code: str
    mark: str | None

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, found.start("code")),
            found["language"],
            re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE),
            found["mark"],
        )
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """Words of each command of a shell block; bash itself reads it first, for its syntax."""
    checked = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, f"{block.place}: {checked.stderr}"
    lines = block.code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return [words for words in found if words]


def clone(folder: Path) -> Path:
    """A folder with everything of this one but data and runs."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def execute(folder: Path, words: list[str]) -> CompletedProcess[str]:
    """``python ...`` as it stands on a page, without the picture of curves."""
    command = words[2:] if words[1] == "-m" else words[1:]
    return programs.execute(command, folder, timeout=120, before=programs.without_curves)


def trains(words: list[str]) -> bool:
    """Whether a command would train, and so is given few steps."""
    return words[1:2] == ["main.py"] and not re.search(r"--(mode|list|help|dry_run|resume)|-h\b", " ".join(words))


def is_large(words: list[str]) -> bool:
    """Whether a command names a configuration of its own, whose model takes long to build and to train."""
    return any(word.startswith("--gin_config_file=") and "synthetic-books" not in word for word in words)


def check_words(block: Block, words: list[str]) -> None:
    """A command that is not run: its program exists, and a program of ours knows its flags by name."""
    if words[0] == "python" and words[1:2] == ["-m"]:
        assert find_spec(words[2]) or words[2] == "venv", f"{block.place}: there is no module {words[2]}"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"{block.place}: there is no {words[1]}"
    for script in ("main.py", "preprocess_public_data.py"):
        if script in words:
            known = _flags_of(script)
            for word in words[words.index(script) + 1 :]:
                name = re.match(r"--(\w+)", word)
                if name:
                    assert {name[1], name[1].removeprefix("no")} & known, f"{block.place}: {script} has no flag {word}"


def _flags_of(script: str) -> set[str]:
    shown = execute(Path(os.environ.get("TMPDIR", "/tmp")), ["python", str(ROOT / script), "--helpfull"])
    return set(re.findall(r"--(?:\[no\])?(\w+)", shown.stdout))
