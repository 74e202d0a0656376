"""Promises of SECURITY.md: calls that the shipped code never makes, hashes of its dependencies, tests that it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "generative_recommenders").rglob("*.py"), *ROOT.glob("*.py")])
NEVER = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "os.system", "os.popen", "marshal.loads",
    "tempfile.mktemp", "yaml.load",
}  # fmt: skip
NEVER_METHODS = {"extract", "extractall"}
NEVER_MODULES = {"subprocess", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}


STARTERS = [
    "generative_recommenders/commands/ablation/jobs.py",  # main.py, once a run
    "generative_recommenders/commands/reproduction/results.py",  # git, for the commit of this code
]
"""Start other programs."""


def faults(source: str) -> Iterator[str]:
    """What a module does that none may."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"import {name}" for name in names if name.split(".")[0] in NEVER_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
        if called in NEVER or (isinstance(node.func, ast.Attribute) and node.func.attr in NEVER_METHODS):
            yield called
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called.endswith("load") and keywords.get("allow_pickle", "False") != "False":
            yield "allow_pickle"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_untrusted_input_is_never_executed(path: Path) -> None:
    allowed = ["import subprocess"] if path.relative_to(ROOT).as_posix() in STARTERS else []
    assert list(faults(path.read_text())) == allowed


@pytest.mark.parametrize("starter", STARTERS)
def test_programs_are_started_without_a_shell(starter: str) -> None:
    tree = ast.parse((ROOT / starter).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    starts = [call for call in calls if ast.unparse(call.func).startswith("subprocess.")]
    assert starts and not any(keyword.arg == "shell" for call in starts for keyword in call.keywords)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import subprocess",
        "from subprocess import run",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "archive.extractall('.')",
        "def f():\n    pickle.loads(b'')",
    ],
)
def test_the_rules_see_what_they_are_for(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize("name", ["requirements", "requirements-gpu"])
def test_every_pinned_requirement_has_a_hash(name: str) -> None:
    pinned = set(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / f"{name}.txt").read_text(), re.MULTILINE))
    lock = (ROOT / f"{name}-lock.txt").read_text()
    hashed = re.findall(r"^([\w-]+)==([\w.]+)(?:\+cpu)?(?: \\\n +--hash=sha256:[0-9a-f]{64})+$", lock, re.MULTILINE)
    assert pinned
    assert pinned <= set(hashed)
    assert len(hashed) == len(re.findall(r"==", lock))


def test_the_tests_named_in_the_document_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+(?:\.py)?)`", (ROOT / "SECURITY.md").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
