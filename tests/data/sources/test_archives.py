"""Extraction of archives: formats, unsafe members, bombs and damage."""

from __future__ import annotations

import gzip
import io
import random
import socket
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from generative_recommenders.data.sources import archives
from generative_recommenders.data.sources.archives import extract, is_archive
from generative_recommenders.errors import UserError
from ratings_files import write, write_zip

UNSAFE_NAMES = ["../evil.csv", "a/../../evil.csv", "/etc/evil.csv", "C:/evil.csv", "..\\evil.csv", "a/.."]
TAR_MODES = {"w": ".tar", "w:gz": ".tar.gz", "w:bz2": ".tar.bz2", "w:xz": ".tar.xz"}

Writer = Callable[[Path, dict[str, bytes]], Path]


def everything(_: str) -> bool:
    return True


def bound(monkeypatch: pytest.MonkeyPatch, **bounds: int) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(archives, name, value)


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_zip_yields_the_wanted_files_without_folders(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"set/": b"", "set/ratings.dat": b"1::2", "set/README": b"no"})
    target = tmp_path / "out"
    assert is_archive(archive)
    assert extract(archive, target, {"ratings.dat"}.__contains__) == [target / "ratings.dat"]
    assert files_under(target) == ["ratings.dat"] and (target / "ratings.dat").read_bytes() == b"1::2"


@pytest.mark.parametrize("mode", TAR_MODES)
def test_tar_of_every_compression(tmp_path: Path, mode: str) -> None:
    archive = write_tar(tmp_path / f"a{TAR_MODES[mode]}", {"set/u.data": b"1\t2", "set/x": b""}, mode)
    assert is_archive(archive)
    (path,) = extract(archive, tmp_path / "out", {"u.data"}.__contains__)
    assert path.read_bytes() == b"1\t2"


def test_leftovers_of_a_killed_unpacking_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "out" / f".unpacking-{socket.gethostname()}-999999999"
    leftover.mkdir(parents=True)
    (leftover / "u.data").write_bytes(b"half")
    extract(write_zip(tmp_path / "a.zip", {"u.data": b"1"}), tmp_path / "out", everything)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["u.data"]


def test_plain_and_lone_gzip_files_are_no_archives(tmp_path: Path) -> None:
    contents = {
        "a.csv": b"u,i\n",
        "a.csv.gz": gzip.compress(b"u,i\n" * 500),
        "cut.gz": b"\x1f\x8b\x08",
        "empty": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert not is_archive(tmp_path / name)


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, name: str, write: Writer) -> None:
    (tmp_path / "deep").mkdir()
    archive = write(tmp_path / "deep" / "a", {"ok.csv": b"1", name: b"evil"})
    before = files_under(tmp_path)
    with pytest.raises(UserError, match="would leave the folder"):
        extract(archive, tmp_path / "deep" / "out", everything)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("ratings.csv")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="link or a device"):
        extract(tmp_path / "a.tar", tmp_path / "out", everything)
    assert files_under(tmp_path / "out") == []


def test_a_symlink_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("ratings.csv")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as pack:
        pack.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="link or a device"):
        extract(tmp_path / "a.zip", tmp_path / "out", everything)


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_bombs_are_refused_and_leave_nothing(tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write(tmp_path / "a", {"small.csv": b"1", "big.csv": bytes(3_000_000)})
    with monkeypatch.context() as tight:
        bound(tight, FREE_BYTES=1_000_000, MOST_RATIO=2)
        for wanted in (everything, {"small.csv"}.__contains__):
            with pytest.raises(UserError, match="zip bomb"):
                extract(archive, tmp_path / "out", wanted)
    assert files_under(tmp_path / "out") == []
    assert len(extract(archive, tmp_path / "out", everything)) == 2
    bound(monkeypatch, MOST_BYTES=1000)
    with pytest.raises(UserError, match="zip bomb"):
        extract(archive, tmp_path / "out", everything)


def test_a_zip_that_lies_about_its_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, FREE_BYTES=1000, MOST_RATIO=1)
    archive = write_zip(tmp_path / "a.zip", {"big.csv": bytes(3_000_000)})
    honest = (3_000_000).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(honest, (10).to_bytes(4, "little")))
    with pytest.raises(UserError):
        extract(archive, tmp_path / "out", everything)
    assert files_under(tmp_path / "out") == []


@pytest.mark.parametrize("in_header", [True, False])
def test_a_negative_size_does_not_pay_for_another_member(
    tmp_path: Path, in_header: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(monkeypatch, MOST_BYTES=2_900)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT if in_header else tarfile.PAX_FORMAT) as tar:
        debt = tarfile.TarInfo("README")
        if in_header:
            debt.size = -512
        else:
            debt.pax_headers = {"size": "-512"}
        # addfile of Python 3.13 refuses such a size itself
        tar.fileobj.write(debt.tobuf(tar.format))
        big = tarfile.TarInfo("big.csv")
        big.size = 3_000
        tar.addfile(big, io.BytesIO(bytes(big.size)))
    with pytest.raises(UserError, match="damaged archive"):
        extract(tmp_path / "a.tar", tmp_path / "out", everything)
    assert files_under(tmp_path / "out") == []


def test_too_many_members_and_doubled_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a/x.csv": b"1", "b/x.csv": b"2", "c/y.csv": b"3"})
    with pytest.raises(UserError, match=r"two files named x\.csv"):
        extract(archive, tmp_path / "out", everything)
    bound(monkeypatch, MOST_MEMBERS=2)
    with pytest.raises(UserError, match="more than 2 files"):
        extract(archive, tmp_path / "out", {"y.csv"}.__contains__)


def test_an_encrypted_member_is_reported(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"x.csv": b"1,2"})
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match="encrypted"):
        extract(archive, tmp_path / "out", everything)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_damage_never_escapes_as_another_error(tmp_path: Path, name: str) -> None:
    """Cut and overwritten bytes: either the archive is still good or one clear line says that it is not."""
    rng = random.Random(5)
    members = {"ratings.csv": rng.randbytes(300), "movies.csv": b"1,a\n" * 50}
    path = tmp_path / name
    if name == "a.zip":
        write_zip(path, members)
    else:
        write_tar(path, members, "w:gz" if name.endswith("gz") else "w")
    content = path.read_bytes()
    refused = 0
    for _ in range(350):
        broken = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
        for _ in range(rng.randrange(1, 4)):
            if broken:
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        write(tmp_path, bytes(broken), name)
        try:
            extract(path, tmp_path / "out", everything)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        assert all(file == name or Path(file).parent == Path("out") for file in files_under(tmp_path))
        for file in (tmp_path / "out").iterdir():
            file.unlink()
    assert refused > 50


@pytest.mark.parametrize("header", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_header_without_measure_is_refused_unread(tmp_path: Path, header: int) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", format=header) as tar:
        tar.addfile(tarfile.TarInfo("x" * (64 << 20)), io.BytesIO())
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"a\.tar\.gz.*a header of \d+ bytes"):
        extract(path, tmp_path / "out", everything)
    assert files_under(tmp_path / "out") == []
