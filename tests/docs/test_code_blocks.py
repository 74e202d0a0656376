"""Code blocks of README.md and docs/: run, or checked as far as they can be here.

Python blocks of a page run one after the other in one namespace, shell blocks command by command in a folder that looks
like a fresh clone. All pages share the run runs/my-run, trained for a few steps on the embedded data set, and the same
prepared data under the names of the public sets. Training commands are given few steps and users, those of the
published configurations ``--dry_run``, and a command that stands on several pages runs once; ``<!-- test: parsed -->``
above a block says that it needs an extra, a cluster or a download: its syntax, programs and flags are checked and
nothing is run. gin and JSON blocks are parsed. text and console blocks are output, and stand as such.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from docs import pages
from docs.test_reference import in_navigation
from generative_recommenders import serve
from generative_recommenders.commands import train
from generative_recommenders.commands.ablation.plan import AblationSettings
from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config.gin import load_ablation, load_settings
from generative_recommenders.distributed.launch import launch

register_built_in_parts()  # gin blocks name their options
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
WRITTEN = [*pages.PAGES, pages.ROOT / "ARCHITECTURE.md", pages.ROOT / "CONTRIBUTING.md"]
SHARED_RUN = "--run_dir=runs/my-run"
SAME_DATA = ("ml-1m", "ml-100k", "ml-20m", "amzn-books", "mine")


done: set[tuple[str, ...]] = set()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pages.clone(tmp_path_factory.mktemp("clone"))
    trained = pages.execute(folder, ["python", "main.py", SHARED_RUN, *pages.SHORT])
    assert trained.returncode == 0, trained.stderr
    ranks = pages.execute(folder, ["python", "main.py", "--mode=evaluate", SHARED_RUN])  # a comparison reads them
    assert ranks.returncode == 0, ranks.stderr
    prepared = folder / "data" / "prepared"
    for name in SAME_DATA:
        shutil.copytree(prepared / "synthetic-books", prepared / name)
    for name in ("one", "two"):
        shutil.copytree(folder / "runs" / "my-run", folder / "runs" / name)
    return folder


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_the_blocks_of_a_page_run(clone: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(train, "Options", partial(train.Options, max_steps=3))  # of `train(...)` in Python blocks
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
            assert block.language in ("toml", "yaml", "dockerfile", "bibtex", "mermaid"), f"{block.place}: what is it?"


def run(clone: Path, block: pages.Block, words: list[str], following: pages.Block | None) -> None:
    """One command of a shell block, or what can be checked of it."""
    if block.mark == "parsed" or words[0] in NOT_RUN:
        pages.check_words(block, words)
        return
    assert words[0] == "python", f"{block.place}: {words[0]} is no program that is known here"
    if words[1:3] in (["-m", "pytest"], ["-m", "venv"]):
        return
    if "--resume" in words and block.mark is None:
        words = [*words, *pages.FEW_STEPS]
    if pages.trains(words):
        if SHARED_RUN in words and "--auto_resume" not in words:
            pages.check_words(block, words)  # trained already, for all pages
            return
        for word in words:
            if word.startswith("--run_dir=") and word != SHARED_RUN:
                shutil.rmtree(clone / word.partition("=")[2], ignore_errors=True)  # of another page
        words = [*words, *(("--dry_run",) if pages.is_large(words) else pages.SHORT)]
    if block.mark is None and tuple(words) in done:
        return
    done.add(tuple(words))
    result = pages.execute(clone, words)
    if block.mark == "fails":
        assert following is not None and following.language == "text", f"{block.place}: where is its error?"
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode in (2, 3) and quotes(following, last), f"{block.place}: {last}"
    else:
        shown = result.stderr[-2000:]
        assert result.returncode == 0, f"{block.place}: {' '.join(words)}: {shown}"


def quotes(block: pages.Block, line: str) -> bool:
    """Whether a text block is this line, with … for what depends on the machine."""
    parts = re.split("(…)", block.code.strip())
    return re.fullmatch("".join(".*" if part == "…" else re.escape(part) for part in parts), line) is not None


def test_quoted_errors_that_no_command_of_their_page_makes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a machine with GPUs and of one without an extra."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main(["runs/my-run"]) == 2
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch(lambda *_: 0, (), 4, device_type="cuda") == 2
    said = capsys.readouterr().err.splitlines()
    quoted = []
    for page in pages.PAGES:
        every = pages.blocks(page)
        for before, block in zip([None, *every], every):
            if block.code.startswith("error: ") and (before is None or before.mark != "fails"):
                assert any(quotes(block, line) for line in said), f"{block.place}: who says so?"
                quoted.append(block)
    assert len(quoted) == len(said)


def test_the_readme_is_short() -> None:
    assert len((pages.ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_links_and_named_files_are_there(page: Path) -> None:
    """Links and their anchors; files in code, from the repository, the package, docs/ or tests/."""
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {slug(each) for each in headings}, f"{target}#{anchor}"
    roots = [pages.ROOT, *(pages.ROOT / name for name in ("generative_recommenders", "docs", "tests"))]
    for name in re.findall(r"`((?:[\w.*-]+/)+[\w.*-]+)/?`", text):
        made = name.startswith(("data/", "runs/", "checkpoints/", "tensorboard/")) or re.search(
            r"\b(NAME|TIME)\b", name
        )
        assert made or any(any(root.glob(name.rstrip("/"))) for root in roots), name


def slug(heading: str) -> str:
    """A heading's anchor."""
    return re.sub(r"[^\w -]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")


def test_every_page_is_in_the_navigation() -> None:
    assert {os.path.relpath(page, pages.ROOT / "docs") for page in pages.PAGES[1:]} == in_navigation()
