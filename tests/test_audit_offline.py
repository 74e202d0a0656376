"""tools/audit_offline.py: which advisories of a copy of the database affect a pinned release."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("yaml")

TOOL = Path(__file__).parents[1] / "tools" / "audit_offline.py"
DATES = 'modified: "2026-07-23T14:32:21Z"\npublished: 2026-07-01T05:15:00Z\n'


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_offline", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load()


def ranges(*events: str, kind: str = "ECOSYSTEM") -> str:
    return f"  ranges:\n  - type: {kind}\n    events:\n" + "".join(f"    - {each}\n" for each in events)


def advise(
    folder: Path,
    affected: str,
    name: str = "some-package",
    number: int = 1,
    package: str = "",
    more: str = "",
) -> None:
    path = folder / "vulns" / name / f"PYSEC-2026-{number}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"id: PYSEC-2026-{number}\n{DATES}{more}aliases:\n- CVE-2026-{number}\naffected:\n"
    path.write_text(f"{head}- package:\n    name: {package or name}\n    ecosystem: PyPI\n{affected}")


def run(folder: Path, lock: str = "some-package==2.0.0 --hash=sha256:00\n") -> int:
    path = folder / "lock.txt"
    path.write_text(lock)
    return tool.main([f"--database={folder}", f"--lock={path}"])


@pytest.mark.parametrize(
    ("affected", "expected"),
    [
        ('  versions:\n  - 1.0.0\n  - "2.0"\n', True),
        ("  versions:\n  - 1.9.9\n  - 2.0.0rc1\n  - 2004d\n", False),
        (ranges('introduced: "0"', "fixed: 2.0.1"), True),
        (ranges('introduced: "0"', "fixed: 2.0.0"), False),
        (ranges("introduced: 2.0.1"), False),
        (ranges('introduced: "0"'), True),
        (ranges('introduced: "0"', "fixed: 1.5.0", 'introduced: "2.0"', "fixed: 2.1.0"), True),
        (ranges("introduced: 3.0.0", "fixed: 3.0.1", 'introduced: "0"', "fixed: 1.5.0"), False),
        (ranges('introduced: "0"', "last_affected: 2.0.0"), True),
        (ranges('introduced: "0"', "last_affected: 1.9.9"), False),
        (ranges('introduced: "0"', "last_affected: 1.9.9-cu124"), False),
        (ranges('introduced: "0"', "last_affected: unknown version"), True),
        (ranges("introduced: unknown version", "fixed: 2.0.0"), False),
        (ranges('introduced: "0"', "{}"), True),
        (ranges('introduced: "0"', kind="GIT"), False),
        ("", False),
    ],
)
def test_a_release_is_affected_by_list_or_range(
    tmp_path: Path, capsys: pytest.CaptureFixture, affected: str, expected: bool
) -> None:
    advise(tmp_path, affected)
    assert run(tmp_path) == int(expected)
    by = "PYSEC-2026-1 = CVE-2026-1" if expected else "none"
    assert f"some-package==2.0.0: advisories 1, affected by {by}\n" in capsys.readouterr().out


def test_withdrawn_advisories_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    advise(tmp_path, ranges('introduced: "0"'), more="withdrawn: 2026-07-02T00:00:00Z\n")
    assert run(tmp_path) == 0
    assert "some-package==2.0.0: advisories 0, affected by none\n" in capsys.readouterr().out


def test_parts_about_other_packages_do_not_count(tmp_path: Path) -> None:
    advise(tmp_path, ranges('introduced: "0"'), package="another-package")
    assert run(tmp_path) == 0


def test_names_are_normalised(tmp_path: Path) -> None:
    advise(tmp_path, ranges('introduced: "0"'), package="Some_Package")
    assert run(tmp_path, "Some.Package==2.0.0\n") == 1


@pytest.mark.parametrize("line", ["# torch==2.13.0+cpu: not here", "torch==2.13.0+cpu --hash=sha256:00"])
def test_a_local_version_is_audited_as_its_release(
    tmp_path: Path, capsys: pytest.CaptureFixture, line: str
) -> None:
    advise(tmp_path, ranges("introduced: 2.13.0", "last_affected: 2.13.0"), name="torch")
    assert run(tmp_path, f"# Made by a tool.\n--extra-index-url https://localhost\n{line}\n") == 1
    assert "torch==2.13.0: advisories 1, affected by PYSEC-2026-1" in capsys.readouterr().out


def test_all_packages_and_the_newest_date_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    advise(tmp_path, ranges('introduced: "0"'))
    advise(tmp_path, ranges('introduced: "0"', 'fixed: "1.0"'), number=2)
    advise(tmp_path, ranges('introduced: "0"'), name="unused")
    assert run(tmp_path, "some-package==2.0.0\nother==1.0 \\\n    --hash=sha256:00\n") == 1
    assert capsys.readouterr().out.splitlines() == [
        "other==1.0: advisories 0, affected by none",
        "some-package==2.0.0: advisories 2, affected by PYSEC-2026-1 = CVE-2026-1",
        "packages 2, advisories 2, affected packages 1",
        "newest advisory that this copy holds for these packages: 2026-07-23",
    ]


def refused(capsys: pytest.CaptureFixture, code: int) -> str:
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize(
    "text",
    [
        "id: [1\nx: }",
        "\x00",
        "- a list",
        "id: PYSEC-2026-1\nmodified: 2026-13-45\n",
        "id: PYSEC-2026-1\n",
        "id: PYSEC-2026-1\naffected:\n- package: some-package\n",
        "id: PYSEC-2026-1\naffected:\n- package: {name: some-package, ecosystem: PyPI}\n  versions: [1.10]\n",
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    advise(tmp_path, ranges('introduced: "0"', 'fixed: "1.0"'))
    bad = tmp_path / "vulns" / "some-package" / "PYSEC-2026-2.yaml"
    bad.write_text(text)
    assert str(bad) in refused(capsys, run(tmp_path))


def test_missing_folders_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("some-package==2.0.0\n")
    arguments = [f"--database={tmp_path / 'absent'}", f"--lock={lock}"]
    assert "absent: no such folder" in refused(capsys, tool.main(arguments))
    (tmp_path / "vulns").mkdir()
    assert "not a copy of PyPA's advisory database" in refused(capsys, run(tmp_path))


@pytest.mark.parametrize("lock", ["some-package>=2.0.0\n", "some-package==two\n", "# nothing\n"])
def test_a_lock_that_pins_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, lock: str
) -> None:
    advise(tmp_path, ranges('introduced: "0"'))
    assert "lock.txt" in refused(capsys, run(tmp_path, lock))


def test_a_missing_lock_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = tool.main([f"--database={tmp_path}", f"--lock={tmp_path / 'absent.txt'}"])
    assert "absent.txt" in refused(capsys, code)


def test_without_pyyaml_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "yaml", None)
    assert "[dev]" in refused(capsys, run(tmp_path))


def test_the_kept_lock_can_be_audited(tmp_path: Path) -> None:
    advise(tmp_path, ranges('introduced: "0"'), name="unused")
    assert tool.main([f"--database={tmp_path}"]) == 0
    names = {name for name, _ in tool.pins(TOOL.parents[1] / "requirements-lock.txt")}
    assert {"torch", "numpy", "pillow"} <= names
