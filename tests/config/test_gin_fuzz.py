"""Generated gin texts: settings, or a refusal in one line; nothing in them runs, opens a device or fills the memory."""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path

import pytest

import generative_recommenders.build.parts  # noqa: F401  (registers the built-in parts)
from generative_recommenders.config.gin import FILE_LIMIT, MAX_FILES, load_settings, override, resolved_text
from generative_recommenders.config.registry import parts_by_gin_name
from generative_recommenders.config.schema import NAMES, RunSettings
from generative_recommenders.errors import UserError

INPUTS = [1000, pytest.param(100_000, marks=pytest.mark.slow)]
MEMORY_LIMIT = 64 << 20  # bytes that the process's peak may grow by
PARAMETERS: dict[str, list[str]] = {}
for _name in [
    *NAMES,
    *(f"{o}.{n}" for o, part in parts_by_gin_name().items() for n in part.options.model_fields),
]:
    PARAMETERS.setdefault(_name.partition(".")[0], []).append(_name.partition(".")[2])
STRANGE = [
    "@train_fn", "@train_fn()", "@a/train_fn()", "%macro", "%a.b", "@gin.singleton()", "@gin.macro", "@nothing()",
    "@gin.constant", "9" * 5000, "1e999", "-1", "0x10", "None", "True", "...", "'" + "x" * 3000 + "'", "b'raw'",
    "[" * 300 + "]" * 300, "{1: 2, 'a': [None]}", "{[]: 1}", "(1,", "__import__('os').system('false')", "9 ** 9 ** 9",
    "lambda: 1", "f'{1}'", "'\\N{nothing}'", "'\\ud800'", "\\", "", "1 2", "{**{}}", "float('nan')", "книга", "\x0c1",
]  # fmt: skip
LINES = [
    "import {module}", "from {module} import x", "import {module} as gin", "from __gin__ import dynamic_registration",
    "include '{file}'", "include '/dev/zero'", "include '../../../../etc/passwd'", "include '{module}/x/y.gin'",
    "include 3", "include '\\0'", "macro = 3", "a.b = @train_fn()", "scope/train_fn.num_epochs = 2",
    "train_fn:\n  num_epochs = 2\n", "train_fn:\n\tnum_epochs = 2", "gin.macro.value = 1",
    "gin.singleton.constructor = @train_fn", "train_fn.__class__ = 1", "train_fn.num_epochs.real = 1", "#" * 2000,
    "'''", "\ufeff", "a" * 4000, "train_fn.", ".train_fn = 1", "x/y/z = 1",
]  # fmt: skip
WORDS = [
    "\n",
    " ",
    "\t",
    "=",
    "@",
    "%",
    "/",
    ".",
    ":",
    "(",
    ")",
    "'",
    '"',
    "\\",
    "\0",
    "\r",
    "#",
    "$",
    "é",
    "import ",
    "include ",
]


class Generator:
    """Texts of good and bad lines, some of them damaged afterwards. folder: with included.gin and the module that
    must not be imported."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder

    def text(self) -> str:
        lines = [self.line() for _ in range(self.random.randint(0, 4))]
        text = "\n".join(lines)
        for _ in range(self.random.choice((0, 0, 1, 3))):
            place = self.random.randrange(len(text) + 1)
            text = text[:place] + self.random.choice(WORDS) + text[place + self.random.choice((0, 0, 1, 9)) :]
        return text

    def line(self) -> str:
        kind = self.random.random()
        if kind < 0.3:
            line = self.random.choice(LINES)
            return line.replace("{module}", "harmful_module").replace("{file}", str(self.folder / "included.gin"))
        owner = self.random.choice(list(PARAMETERS))
        value = (
            self.random.choice(STRANGE) if kind < 0.6 else repr(self.random.choice((0, 3, 0.5, "x", [1], {"a": 1.0})))
        )
        return f"{owner}.{self.random.choice(PARAMETERS[owner])} = {value}"


@pytest.fixture
def harmful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path whose module, once imported, leaves a file; in it gin text is parsed."""
    mark = tmp_path / "imported"
    for name in ("harmful_module.py", "harmful_package/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "included.gin").write_text("train_fn.num_epochs = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return mark


def outcome(files: list[Path], bindings: list[str]) -> str | None:
    """The line of a refusal; None where there are settings, which survive their own text."""
    try:
        settings = load_settings(files, bindings)
        assert resolved_text(settings)
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip()
        return str(error)
    assert isinstance(settings, RunSettings)
    return None


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")  # as generated
@pytest.mark.parametrize("inputs", INPUTS)
def test_fuzz(harmful: Path, tmp_path: Path, inputs: int) -> None:
    """Half of the texts as a file, half as bindings."""
    generator, path = Generator(7, tmp_path), tmp_path / "x.gin"
    modules, refused = set(sys.modules), 0
    before = peak_memory()
    for number in range(inputs):
        text = generator.text()
        if number % 2:
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            refused += outcome([path], []) is not None
        else:
            refused += outcome([], [text]) is not None
    assert not harmful.exists()
    assert not {name for name in set(sys.modules) - modules if name.startswith("harmful")}
    assert peak_memory() - before < MEMORY_LIMIT
    assert inputs // 10 < refused < inputs  # both sides are reached
    assert [each.name for each in tmp_path.iterdir() if each.name not in KNOWN] == []


KNOWN = {"x.gin", "included.gin", "harmful_module.py", "harmful_package", "__pycache__"}


@pytest.mark.parametrize(
    "text",
    [
        "import harmful_module",
        "from harmful_package import thing",
        "import harmful_module as h",
        "train_fn.num_epochs = 3\nimport \\\n harmful_module",
        "include 'harmful_package/deep/x.gin'",
        "include \\\n 'harmful_package/deep/x.gin'",
        "train_fn.main_module = @harmful_module.thing()",
    ],
)
def test_nothing_is_imported(harmful: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.gin"
    path.write_text(text)
    for told in (outcome([path], []), outcome([], [text])):
        assert told is not None and "line" in told
    with pytest.raises(UserError):
        override(RunSettings(), [text])
    assert not harmful.exists()


def test_an_import_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.gin").write_text("# comment\nimport os.path\n")
    told = outcome([tmp_path / "x.gin"], [])
    assert told is not None and "x.gin, line 2" in told and "'import os.path'" in told


def test_includes_that_circle_or_multiply_end(tmp_path: Path) -> None:
    (tmp_path / "x.gin").write_text(f"include '{tmp_path / 'x.gin'}'")
    told = outcome([tmp_path / "x.gin"], [])
    assert told is not None and f"more than {MAX_FILES} files" in told
    for level in range(30):
        line = f"include '{tmp_path / f'{level + 1}.gin'}'\n"
        (tmp_path / f"{level}.gin").write_text(2 * line if level < 29 else "")
    told = outcome([tmp_path / "0.gin"], [])
    assert told is not None and f"more than {MAX_FILES} files" in told


def test_the_name_of_a_missing_include_stays_on_one_line() -> None:
    told = outcome([], ["include 'no\\nwhere.gin'"])
    assert told is not None and "nwhere.gin" in told


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "x.gin"
    for content, word in (
        (b"#" * (FILE_LIMIT + 1), "longer"), (b"train_fn.num_epochs = 3 # \xff", "UTF-8"), (b"a\0b", "zero byte"),
    ):  # fmt: skip
        path.write_bytes(content)
        told = outcome([path], [])
        assert told is not None and word in told and "x.gin" in told
    told = outcome([Path("/dev/zero")], [])
    assert told is not None and "/dev/zero" in told
