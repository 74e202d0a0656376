"""Pages of reports in headless Chromium: a silent console, nothing asked of the network, nothing wider than the
window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from generative_recommenders.data.splits import make_split
from generative_recommenders.run.report.facts import write_facts
from generative_recommenders.run.report.page import write_comparison, write_report
from recommender_runs import CHOICES, make_run
from report_runs import ranks_of, titled_dataset

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]
PROBE = """<script>
const root = document.documentElement;
const wide = [...document.querySelectorAll("body *")].filter(each =>
  each.getBoundingClientRect().right > root.clientWidth + 1 && !each.closest(".scroll, svg"));
const empty = [...document.querySelectorAll("svg")].filter(each => each.getBoundingClientRect().height < 40);
document.title = JSON.stringify({window: root.clientWidth, page: root.scrollWidth,
  wide: wide.map(each => each.outerHTML.slice(0, 80)), empty: empty.length,
  pictures: document.querySelectorAll("svg").length});
</script></body>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with two heads, another, and both compared."""
    root = tmp_path_factory.mktemp("pages")
    dataset = titled_dataset(root / "data")
    runs = []
    for seed, kind in enumerate(("HSTU", "TwoTower")):
        (root / kind).mkdir()
        run, _, _ = make_run(root / kind, dataset, CHOICES[kind])
        ranks = {method: ranks_of(dataset, number) for number, method in enumerate((kind, "most popular"), seed)}
        write_facts(run, dataset, make_split(dataset, "leave_one_out"), ranks)
        runs.append(run)
    return [*(write_report(run) for run in runs), write_comparison(runs, root / "comparison.html")]


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """The page's elements after it was shown, and what Chromium logged."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "--disable-component-update",
        "--enable-logging=stderr", "--dump-dom", *flags,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_page_is_wider_than_its_window_and_no_picture_is_empty(
    pages: list[Path], tmp_path: Path, number: int, width: int
) -> None:
    probed = tmp_path / "page.html"
    probed.write_text(pages[number].read_text().replace("</body>", PROBE))
    shown, log = browse(probed, tmp_path, f"--window-size={width},900")
    title = re.search(r"<title>(.*?)</title>", shown, re.S)
    assert title is not None
    found = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["wide"] == [] and found["page"] <= found["window"] <= width
    assert found["empty"] == 0 and found["pictures"] >= 3
    assert "CONSOLE" not in log


@pytest.mark.parametrize("number", [0, 1, 2])
def test_nothing_is_asked_of_the_network(pages: list[Path], tmp_path: Path, number: int) -> None:
    netlog = tmp_path / "net.json"
    _, log = browse(pages[number], tmp_path, f"--log-net-log={netlog}")
    assert "CONSOLE" not in log
    hosts = set(re.findall(r'"url":"(https?://[^"]*)"', netlog.read_text()))
    own = pages[number].read_text()
    assert not [host for host in hosts if host in own]
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*"', own)
