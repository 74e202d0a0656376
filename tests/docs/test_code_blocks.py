"""Every code block of README.md and docs/ runs, or is checked as far as it can be here.

Python blocks of a page run one after the other in one namespace, shell blocks command by command in a folder that looks like a
fresh clone. All pages share the run runs/my-run, trained for a few steps on the embedded data set, and the same prepared data
under the names of the public sets. Training commands are given few steps and users, those of the published configurations
``--dry_run``, and a command that stands on several pages runs once; ``<!-- test: parsed -->`` above a block says that it
needs an extra, a cluster or a download: its syntax, programs and flags are checked and nothing is run. gin and JSON blocks are
parsed. text and console blocks are output, and stand as such.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import generative_recommenders.build.parts  # noqa: F401  # registers the built-in parts, whose options gin blocks name
from docs import pages
from generative_recommenders.commands.ablation.plan import AblationSettings
from generative_recommenders.config.gin import load_ablation, load_settings

NOT_RUN = (
    ".",
    "pip",
    "git",
    "cd",
    "docker",
    "torchrun",
    "srun",
    "sbatch",
    "curl",
    "mkdocs",
    "next-item",
    "uv",
    "export",
)
"""Programs of others, ones that need a network, and the console script, whose package the tests do not install."""
SHARED_RUN = "--run_dir=runs/my-run"
SAME_DATA = ("ml-1m", "ml-100k", "ml-20m", "amzn-books", "mine")


done: set[tuple[str, ...]] = set()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pages.clone(tmp_path_factory.mktemp("clone"))
    trained = pages.execute(folder, ["python", "main.py", SHARED_RUN, *pages.SHORT])
    assert trained.returncode == 0, trained.stderr
    ranks = pages.execute(
        folder, ["python", "main.py", "--mode=evaluate", SHARED_RUN]
    )  # a comparison reads them
    assert ranks.returncode == 0, ranks.stderr
    prepared = folder / "data" / "prepared"
    for name in SAME_DATA:
        shutil.copytree(prepared / "synthetic-books", prepared / name)
    for name in ("one", "two"):
        shutil.copytree(folder / "runs" / "my-run", folder / "runs" / name)
    write_ratings(folder / "ratings.csv")
    return folder


def write_ratings(path: Path) -> None:
    """2,000 events with a header, of 100 users and 50 items."""
    draw = np.random.default_rng(0)
    events = [
        f"u{event % 100},i{item},{1 + item % 5},{1_600_000_000 + event},{'abc'[item % 3]}"
        for event, item in enumerate(draw.integers(0, 50, 2000).tolist())
    ]
    path.write_text("\n".join(["user_id,item_id,rating,timestamp,shelf", *events]) + "\n")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_the_blocks_of_a_page_run(clone: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    monkeypatch.setenv("COLUMNS", "200")
    namespace: dict[str, object] = {"__name__": "page"}
    every = pages.blocks(page)
    for block, following in zip(every, [*every[1:], None]):
        if block.language in pages.OUTPUT:
            continue
        if block.language == "python":
            compiled = compile(block.code, block.place, "exec")
            if block.mark != "parsed":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compiled, namespace)
        elif block.language in pages.SHELL:
            for words in pages.commands(block):
                run(clone, block, words, following)
        elif block.language == "gin":
            file = clone / "page.gin"
            file.write_text(block.code)
            if "ablation." in block.code:
                load_ablation(file, (), AblationSettings.model_fields)
            else:
                load_settings([file])
        elif block.language == "json":
            json.loads(block.code)
        else:
            assert block.language in ("toml", "yaml", "dockerfile", "bibtex", "mermaid"), (
                f"{block.place}: what is it?"
            )


def run(clone: Path, block: pages.Block, words: list[str], following: pages.Block | None) -> None:
    """One command of a shell block, or what can be checked of it."""
    if block.mark == "parsed" or words[0] in NOT_RUN:
        pages.check_words(block, words)
        return
    assert words[0] == "python", f"{block.place}: {words[0]} is no program that is known here"
    if words[1:3] == ["-m", "pytest"]:
        return
    if pages.trains(words):
        if SHARED_RUN in words and "--auto_resume" not in words:
            pages.check_words(block, words)  # trained already, for all pages
            return
        for word in words:
            if word.startswith("--run_dir="):
                shutil.rmtree(clone / word.partition("=")[2], ignore_errors=True)  # of another page
        words = [*words, *(("--dry_run",) if pages.is_large(words) else pages.SHORT)]
    if block.mark is None and tuple(words) in done:
        return
    done.add(tuple(words))
    result = pages.execute(clone, words)
    if block.mark == "fails":
        assert following is not None and following.language == "text", f"{block.place}: where is its error?"
        last = result.stderr.strip().splitlines()[-1]
        expected = "".join(
            ".*" if part == "…" else re.escape(part) for part in re.split("(…)", following.code.strip())
        )
        assert result.returncode in (2, 3) and re.fullmatch(expected, last), f"{block.place}: {last}"
    else:
        shown = result.stderr[-2000:]
        assert result.returncode == 0, f"{block.place}: {' '.join(words)}: {shown}"


def test_the_readme_is_short() -> None:
    assert len((pages.ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", (pages.ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (pages.ROOT / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (pages.ROOT / "mkdocs.yml").read_text()
    for page in pages.PAGES[1:]:
        name = os.path.relpath(page, pages.ROOT / "docs")
        assert name in navigation or name.rsplit("/", 1)[0] + "/" in navigation, name
