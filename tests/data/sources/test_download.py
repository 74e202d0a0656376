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
WITHOUT_RANGES = ("no-ranges", "no-ranges-cut", "no-ranges-wrong", "portal")
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@dataclass
class Site:
    """A server on this machine: /good, /cut (ends full answers early), /wrong, /short (less than there is),
    /missing, and others that know no ranges; /cut-then-portal is cut once and then answers with a page.
    """

    address: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"


def _content(page: str) -> bytes:
    if page in ("portal", "short"):
        return PAGE
    return bytes(len(CONTENT)) if "wrong" in page else CONTENT


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            page = self.path.strip("/")
            site.requests.append((page, asked))
            if page == "missing":
                return self.send_error(404)
            cut = page == "no-ranges-cut" or (page.startswith("cut") and not asked)
            page = "portal" if page == "cut-then-portal" and asked else page
            content = _content(page)
            start = int(asked.split("=")[1].rstrip("-")) if asked and page not in WITHOUT_RANGES else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : len(content) // 3] if cut else content[start:])
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


def _remote(*urls: str, checksum: str | None = MD5) -> RemoteFile:
    return RemoteFile("data.bin", urls, checksum)


def test_downloads_once_and_leaves_no_part(site: Site, tmp_path: Path) -> None:
    remote = _remote(site.url("good"))
    path = fetch(remote, tmp_path / "raw", progress=False)
    assert path == tmp_path / "raw" / "data.bin" and path.read_bytes() == CONTENT
    assert [each.name for each in path.parent.iterdir()] == ["data.bin"]
    fetch(remote, tmp_path / "raw", progress=False)
    assert site.requests == [("good", None)]


def test_goes_on_to_the_next_mirror(site: Site, tmp_path: Path) -> None:
    remote = _remote("http://127.0.0.1:9/refused", site.url("missing"), site.url("wrong"), site.url("good"))
    assert fetch(remote, tmp_path, progress=False).read_bytes() == CONTENT
    assert [page for page, _ in site.requests] == ["missing", "wrong", "good"]


def test_takes_up_a_cut_download_with_a_range(site: Site, tmp_path: Path) -> None:
    fetch(_remote(site.url("cut")), tmp_path, progress=False)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.requests == [("cut", None), ("cut", f"bytes={len(CONTENT) // 3}-")]


@pytest.mark.parametrize("page", ["good", "no-ranges"])
@pytest.mark.parametrize("have", [1, 1000, len(CONTENT)])
def test_takes_up_the_part_of_an_earlier_call(site: Site, tmp_path: Path, page: str, have: int) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:have])
    assert fetch(_remote(site.url(page)), tmp_path, progress=False).read_bytes() == CONTENT
    assert site.requests == [(page, f"bytes={have}-")]


@pytest.mark.parametrize("size", [1000, len(CONTENT), len(CONTENT) + 5])
def test_a_part_of_another_file_is_dropped(site: Site, tmp_path: Path, size: int) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * size)
    assert fetch(_remote(site.url("good")), tmp_path, progress=False).read_bytes() == CONTENT


BAD = ["portal", "wrong", "no-ranges-wrong", "no-ranges-cut", "short", "missing"]


@pytest.mark.parametrize("page", BAD)
def test_a_bad_mirror_does_not_cost_the_bytes_held(site: Site, tmp_path: Path, page: str) -> None:
    part, have = tmp_path / "data.bin.part", len(CONTENT) // 2
    part.write_bytes(CONTENT[:have])
    with pytest.raises(UserError, match="cannot download"):
        fetch(_remote(site.url(page)), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == [part] and part.read_bytes() == CONTENT[:have]
    fetch(_remote(site.url(page), site.url("good")), tmp_path, progress=False)
    assert site.requests[-1] == ("good", f"bytes={have}-")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("data.bin", CONTENT)]


def test_more_bytes_than_were_held_are_kept_when_the_answer_is_cut(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    fetch(_remote(site.url("no-ranges-cut"), site.url("good")), tmp_path, progress=False)
    assert site.requests[-1] == ("good", f"bytes={len(CONTENT) // 3}-")


@pytest.mark.parametrize("size", [1000, len(CONTENT) // 2, len(CONTENT) + 5])
def test_a_part_of_another_file_is_dropped_though_the_new_download_is_cut(
    site: Site, tmp_path: Path, size: int
) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * size)
    (tmp_path / "data.bin.part.new").write_bytes(b"left by a killed run")
    assert fetch(_remote(site.url("cut")), tmp_path, progress=False).read_bytes() == CONTENT
    assert [each.name for each in tmp_path.iterdir()] == ["data.bin"]


def test_without_a_checksum_a_short_page_is_not_taken_for_the_rest(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answered less than it had sent before"):
        fetch(_remote(site.url("cut-then-portal"), checksum=None), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_without_a_checksum_an_old_part_is_not_trusted(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    path = fetch(_remote(site.url("good"), checksum=None), tmp_path, progress=False)
    assert path.read_bytes() == CONTENT
    assert site.requests == [("good", None)]


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
def test_a_malformed_proxy_is_one_line(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setattr("urllib.request._opener", None)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(UserError, match=r"^.*\(127\.0\.0\.1:\d+: [^\n]+--raw_path=FILE$"):
        fetch(_remote(site.url("good")), tmp_path, progress=False)


def test_progress_bar_counts_bytes(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(_remote(site.url("good")), tmp_path, progress=True)
    assert "data.bin: 100%" in capsys.readouterr().err


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
