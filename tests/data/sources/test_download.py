"""Downloads from mirrors: checksums, failures, and what to do without a network."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from generative_recommenders.data.sources.download import RemoteFile, fetch, file_digest
from generative_recommenders.errors import UserError

CONTENT = bytes(range(256)) * 2_000
PAGE = b"<html>please log in</html>"
BAD = ["cut", "wrong", "page", "nothing", "missing"]
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@dataclass
class Site:
    """A server on this machine: /good, /cut (ends the answer early), /wrong, /page (something short), /nothing,
    /missing."""

    address: str = ""
    requests: list[str] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    contents = {"good": CONTENT, "cut": CONTENT, "wrong": bytes(len(CONTENT)), "page": PAGE, "nothing": b""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = self.path.strip("/")
            site.requests.append(page)
            if page not in contents:
                return self.send_error(404)
            content = contents[page]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 3] if page == "cut" else content)
            return None

        def log_message(self, *_: object) -> None: ...

    return Handler


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def _remote(*urls: str) -> RemoteFile:
    return RemoteFile("data.bin", urls, MD5)


def test_downloads_once_and_leaves_no_part(site: Site, tmp_path: Path) -> None:
    remote = _remote(site.url("good"))
    path = fetch(remote, tmp_path / "raw", progress=False)
    assert path == tmp_path / "raw" / "data.bin" and path.read_bytes() == CONTENT
    assert [each.name for each in path.parent.iterdir()] == ["data.bin"]
    fetch(remote, tmp_path / "raw", progress=False)
    assert site.requests == ["good"]


def test_tries_the_next_mirror(site: Site, tmp_path: Path) -> None:
    remote = _remote("http://127.0.0.1:9/refused", *map(site.url, [*BAD, "good", "never-asked"]))
    assert fetch(remote, tmp_path, progress=False).read_bytes() == CONTENT
    assert site.requests == [*BAD, "good"]
    assert [each.name for each in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("page", BAD)
def test_a_bad_mirror_does_not_cost_the_file_that_is_there(site: Site, tmp_path: Path, page: str) -> None:
    """Even one that is not the published file, as a newer edition: only the whole published file takes its place."""
    target = tmp_path / "data.bin"
    target.write_bytes(b"another edition")
    with pytest.raises(UserError, match="cannot download"):
        fetch(_remote(site.url(page)), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"another edition"


@pytest.mark.parametrize("page", BAD)
def test_every_fault_reports_one_line_error_with_its_reason(site: Site, tmp_path: Path, page: str) -> None:
    reason = {"cut": r"IncompleteRead\(.*\)", "missing": "404.*Not Found.*"}.get(page, "its md5 is not .*")
    with pytest.raises(UserError, match=rf"^cannot download data\.bin \(127\.0\.0\.1:\d+: {reason}\): [^\n]+$"):
        fetch(_remote(site.url(page)), tmp_path, progress=False)


def test_what_a_killed_download_left_is_not_trusted(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    fetch(_remote(site.url("good")), tmp_path, progress=False)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("data.bin", CONTENT)]


def test_a_downloaded_file_is_readable_as_any_new_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = fetch(_remote(site.url("good")), tmp_path, progress=False)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_wrong_checksum_everywhere_leaves_nothing(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"its md5 is not the published {MD5}"):
        fetch(_remote(site.url("wrong"), site.url("wrong")), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_place_is_replaced_or_named(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    target.write_bytes(b"broken")
    with pytest.raises(UserError, match=f"{re.escape(str(target))} is not the published file"):
        fetch(_remote(site.url("missing")), tmp_path, progress=False)
    assert fetch(_remote(site.url("good")), tmp_path, progress=False).read_bytes() == CONTENT


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    remote = _remote("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    with pytest.raises(UserError) as caught:
        fetch(remote, tmp_path / "raw", progress=False)
    line = str(caught.value)
    assert "\n" not in line and line.count("127.0.0.1:9: ") == line.lower().count("refused") == 1
    assert f"download http://127.0.0.1:9/a by hand and put it at {tmp_path / 'raw' / 'data.bin'}" in line
    assert "--raw_path" in line


@pytest.mark.parametrize("url", ["http://[::1", "http://[::1/file", "nonsense", "http://127.0.0.1:port/file"])
def test_a_malformed_mirror_is_one_that_failed(site: Site, tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError) as caught:
        fetch(_remote(url), tmp_path, progress=False)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("cannot download data.bin (")
    assert fetch(_remote(url, site.url("good")), tmp_path, progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("proxy", ["http://[::1", "http:/proxy", "http://proxy:port"])
def test_a_malformed_proxy_reports_one_line_error(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(UserError, match=r"^.*\(127\.0\.0\.1:\d+: [^\n]+--raw_path=FILE$"):
        fetch(_remote(site.url("good")), tmp_path, progress=False)


def test_progress_bar_counts_bytes(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(_remote(site.url("good")), tmp_path, progress=True)
    assert "data.bin: 100%" in capsys.readouterr().err
    fetch(_remote(site.url("good")), tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_unwritable_folder_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*data\.bin\.part"):
        fetch(_remote(site.url("good")), tmp_path, progress=False)


def test_digest_of_what_a_gzip_file_holds(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(CONTENT))
    assert file_digest(path, decompress=True) == MD5
    assert file_digest(path, "sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
