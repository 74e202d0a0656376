"""Tables of the documentation against the program: what combines with what, and how public formats are read."""

from __future__ import annotations

import re
import runpy
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest

from docs.pages import PAGES, ROOT, blocks, execute
from generative_recommenders.build.parts import build_task
from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config.published import ELSEWHERE, PUBLISHED
from generative_recommenders.config.registry import ENCODERS, LOSSES, OBJECTIVES, REGISTRIES, Registry
from generative_recommenders.config.schema import NAMES
from generative_recommenders.data.readers.events import EventReader, ReadOptions
from generative_recommenders.errors import UserError
from tiny_models import catalogue, settings

FORMATS = runpy.run_path(str(ROOT / "tests/data/readers/test_published_formats.py"))["FORMATS"]


def table(page: str, first: str) -> dict[str, dict[str, str]]:
    """Rows of the table whose head begins with a word, by their first cell."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    head = next(line for line in lines if line.startswith(f"| {first} |"))
    names = [cell.strip() for cell in head.strip("|").split("|")]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not cells[0].startswith("---"):
            rows[cells[0]] = dict(zip(names[1:], cells[1:]))
    return rows


def by_name(rows: dict[str, dict[str, str]], known: list[str]) -> dict[str, dict[str, str]]:
    """Cells of each part that a row's head names; names that stand in two heads belong to the first."""
    found: dict[str, dict[str, str]] = {}
    for heads, cells in rows.items():
        for name in re.findall(r"\w+", heads):
            if name in known:
                found.setdefault(name, cells)
    return found


def built_in(registry: Registry) -> list[str]:
    """Names of the package's own parts, without those that other tests register in the same process."""
    return [part.name for part in registry.parts() if part.make.__module__.startswith("generative_recommenders.")]


ENCODER_ROWS = by_name(table("README.md", "encoder"), built_in(ENCODERS))
LOSS_ROWS = by_name(table("README.md", "loss"), built_in(LOSSES))


def cell(cells: dict[str, str], name: str) -> bool:
    return next(value for head, value in cells.items() if name in head.split(", ")) == "yes"


def test_the_tables_name_every_part() -> None:
    assert set(ENCODER_ROWS) == set(built_in(ENCODERS))
    assert set(LOSS_ROWS) == set(built_in(LOSSES))


@pytest.mark.parametrize("similarity", ["DotProduct", "MoL"])
@pytest.mark.parametrize("loss", LOSS_ROWS)
def test_the_combinations_of_the_readme(loss: str, similarity: str) -> None:
    mol = {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK"}
    objectives = [name for name in OBJECTIVES.names() if name != "future"]
    encoders = list(ENCODER_ROWS) if loss in ("SampledSoftmaxLoss", "CE") else ["SASRec"]
    for encoder, objective in product(encoders, objectives):
        chosen = settings(
            main_module=encoder, objective=objective, loss_module=loss, negatives_sharing="block",
            **(mol if similarity == "MoL" else {}),
        )  # fmt: skip
        expected = cell(ENCODER_ROWS[encoder], objective) and cell(LOSS_ROWS[loss], similarity)
        expected &= objective != "replaced" or similarity == "DotProduct"
        expected &= loss != "BCELossWithRatings" or objective.startswith("causal")
        try:
            build_task(chosen, catalogue())
            built = True
        except UserError:
            built = False
        assert built == expected, f"{encoder}, {objective}, {loss}, {similarity}"


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_hstu_with_softmax_takes_causal_objectives_alone(objective: str) -> None:
    chosen = settings(**{"main_module": "HSTU", "objective": objective, "hstu.normalization": "softmax_rel_bias"})
    if objective == "causal":
        build_task(chosen, catalogue())
    else:
        with pytest.raises(UserError, match="rel_bias"):
            build_task(chosen, catalogue())


@pytest.mark.parametrize("name", table("docs/own-data.md", "data set"))
def test_a_public_format_is_read_by_the_flags_of_its_row(tmp_path: Path, name: str) -> None:
    flags = table("docs/own-data.md", "data set")[name]["flags"]
    found = re.fullmatch(r"`--columns=(\S+)`", flags)
    assert found or flags == "none"
    file, text, _, (user, item, rating, _) = FORMATS[name]
    (tmp_path / file).write_text(text)
    reader = EventReader([tmp_path / file], ReadOptions(found[1] if found else None))
    event = pa.concat_tables(reader.batches()).to_pylist()[0]
    assert (event["user"], event["item"], event.get("rating")) == (user, item, rating)
    assert event["timestamp"] is not None


def test_every_public_format_has_a_row() -> None:
    assert set(table("docs/own-data.md", "data set")) == set(FORMATS)


def test_gin_names_on_pages_are_known() -> None:
    register_built_in_parts()
    parts = [part for registry in REGISTRIES.values() for part in registry.parts()]
    options = {f"{part.gin_name}.{option}" for part in parts for option in part.options.model_fields}
    known = {*NAMES, *PUBLISHED, *ELSEWHERE, *options}
    owners = {name.partition(".")[0] for name in known}
    for page in PAGES:
        wrong = " ".join(block.code for block in blocks(page) if block.mark == "fails")
        for name in re.findall(r"\b([A-Za-z]\w*\.[a-z]\w*)\b", page.read_text(encoding="utf-8")):
            ours = name.partition(".")[0] in owners and not name.endswith(".py")
            assert not ours or name in known or name in wrong, f"{page}: {name}"


@pytest.mark.parametrize(
    "program",
    [
        "main.py",
        "preprocess_public_data.py",
        *(f"generative_recommenders.{m}" for m in ("ablate", "reproduce", "report", "serve")),
    ],
)
def test_every_flag_of_a_program_is_on_a_page(program: str, tmp_path: Path) -> None:
    words = ["python", str(ROOT / program)] if program.endswith(".py") else ["python", "-m", program]
    flags = set(re.findall(r"^  --(?:\[no\])?(\w+)", execute(tmp_path, [*words, "--help"]).stdout, re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "results")
    assert flags and not {flag for flag in flags if not re.search(rf"--(no)?{flag}\b", text)}


def test_every_ablation_has_a_row() -> None:
    rows = " ".join(table("docs/ablations.md", "file in configs/ablations"))
    assert set(re.findall(r"`([\w-]+\.gin)`", rows)) == {
        path.name for path in (ROOT / "configs" / "ablations").glob("*.gin")
    }


@pytest.mark.parametrize(
    ("page", "first", "place"),
    [
        ("replay", "RePlay", r"the same under `(compat\.replay[\w.]*)`"),
        ("meta", "there", r"`generative_recommenders\.?([\w.]*)`"),
    ],
)
def test_names_of_others_are_where_their_row_says(page: str, first: str, place: str) -> None:
    rows = [(head, re.fullmatch(place, cells["here"])) for head, cells in table(f"docs/from/{page}.md", first).items()]
    assert sum(found is not None for _, found in rows) > 4
    for head, found in rows:
        if found:
            module = import_module(f"generative_recommenders.{found[1]}".rstrip("."))
            known = getattr(module, "__all__", dir(module))  # what is imported on first use needs an extra
            for name in re.findall(r"`(?:[\w.]+\.)?(\w+)`", head.partition(":")[2] or head):
                assert name in known or find_spec(f"{module.__name__}.{name}"), f"{module.__name__}: {name}"
