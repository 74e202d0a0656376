"""Generated pages of the documentation: settings, options of parts, measured numbers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from generative_recommenders.commands.ablation.plan import Ablation, cells_of
from generative_recommenders.commands.ablation.search import distribution
from generative_recommenders.config.registry import REGISTRIES, Part, Registry
from generative_recommenders.config.schema import FIELDS, GROUPS, NAMES, RunSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETTINGS, MEASURED, REPRODUCED = hook("settings"), hook("measured"), hook("reproduced")
PARTS = [
    (kind, part.name)
    for kind, registry in REGISTRIES.items()
    for part in registry.parts()
    if part.make.__module__.startswith("generative_recommenders.")
]


def text_of(page: Path) -> str:
    return SETTINGS.on_page_markdown(MEASURED.on_page_markdown(page.read_text()))


def in_navigation() -> set[str]:
    return set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))


def row(text: str, name: str) -> list[str]:
    line = next((each for each in text.splitlines() if each.startswith(f"| `{name}` |")), None)
    assert line is not None, f"no row of {name}"
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_configuration_names_every_setting_with_the_default_of_a_run() -> None:
    text = text_of(DOCS / "configuration.md")
    for name in NAMES:
        _, kind, default, meaning = row(text, name)
        assert default == f"`{RunSettings().value(name)!r}`".replace("|", "\\|"), name
        assert kind and len(meaning) > 10, name


def test_every_setting_is_described_in_code() -> None:
    missing = [name for name, (group, field) in FIELDS.items() if not GROUPS[group].model_fields[field].description]
    assert not missing


def used(registry: Registry, part: Part, option: str) -> object:
    """The value of an option in a run that chooses the part and binds nothing else."""
    run = RunSettings()
    if registry.setting in FIELDS:
        run = run.bind({registry.setting: part.name})
    given = run.part_options(part)
    return given.get(option, part.default(option))


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_has_a_page_in_the_navigation_with_its_options(kind: str, name: str) -> None:
    registry = REGISTRIES[kind]
    part = registry[name]
    marks = f"<!-- settings: part {kind} {name} -->", f"<!-- settings: parts {kind} #"
    pages = [page for page in in_navigation() if any(mark in (DOCS / page).read_text() for mark in marks)]
    assert pages, f"write a page of {registry.kind} {name!r} below docs/ and name it in mkdocs.yml"
    text = text_of(DOCS / pages[0])
    assert f'"{name}"' in text or f"={name}`" in text
    for option in part.options.model_fields:
        _, _, default, meaning = row(text, f"{part.gin_name}.{option}")
        value = used(registry, part, option)
        assert default == ("none: give a value" if value is ... else f"`{value!r}`".replace("|", "\\|")), option
        assert len(meaning) > 5, f"say in the docstring of {name} what {option} is"


def test_every_page_finds_what_it_asks_for() -> None:
    for page in DOCS.rglob("*.md"):
        text = text_of(page)
        assert "<!-- settings:" not in text and "<!-- measured:" not in text, page
        for formula in re.findall(r"\$\$.*?\$\$", text, re.DOTALL):
            assert formula.count("{") == formula.count("}"), (page, formula)


@pytest.mark.parametrize("page", ["ablations.md", "reproduce.md"])
def test_files_of_ablations_on_pages_are_read(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```text\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    files = [block for block in blocks if "ablation." in block]
    assert files
    for number, text in enumerate(files):
        file = tmp_path / f"{number}.gin"
        file.write_text(text)
        settings = Ablation.load(file, (), tmp_path / "runs").settings
        assert cells_of(settings, file) if settings.cells or settings.grid else settings.search
        for name, given in settings.search.items():
            pytest.importorskip("optuna")
            assert distribution(name, given, file)


def test_a_row_that_is_not_there_stops_the_build() -> None:
    with pytest.raises(KeyError, match="no row"):
        MEASURED.rows_of("ml-1m-sweeps # Losses # NoSuchLoss")


def test_pages_of_parts_show_reproduced_runs(tmp_path: Path) -> None:
    results, configs = tmp_path / "results", tmp_path / "configs"
    (results / "made").mkdir(parents=True)
    (configs / "made").mkdir(parents=True)
    (results / "made.md").write_text("# made")
    (configs / "made" / "lane.gin").write_text('train_fn.main_module = "SASRec"\nablation.cells = {"a": {}, "b": {}}\n')
    for cell, seed, bound, gain in (
        ("a", 1, [], 0.1),
        ("a", 2, [], 0.2),
        ("b", 1, ["train_fn.main_module = 'HSTU'"], 0.3),
        ("c", 1, ["train_fn.main_module = 'HSTU'", "train_fn.interaction_module_type = 'MoL'"], 0.4),
    ):
        record = {"lane": "lane", "cell": cell, "seed": seed, "bindings": bound}
        record["test"] = {"hr@10": 2 * gain, "ndcg@10": gain}
        (results / "made" / f"lane-{cell}-seed-{seed}.json").write_text(json.dumps(record))
    (results / "made" / "lane-a-seed-3.json").write_text(
        '{"lane": "lane", "cell": "a", "seed": 3, "failed": "no memory"}'
    )
    lines = REPRODUCED.runs_of("encoders", "SASRec", results, configs).splitlines()
    assert lines[2:] == ["| [made](../results/made.md) | `lane` | a | 2 | 0.3000 | 0.1500 |"]
    assert "| b | 1 | 0.6000 | 0.3000 |" in REPRODUCED.runs_of("encoders", "HSTU", results, configs)
    assert REPRODUCED.runs_of("encoders", "FuXi", results, configs) == ""
    assert REPRODUCED.runs_of("encoders", "SASRec", results, configs, "made").splitlines() == lines
    assert REPRODUCED.runs_of("encoders", "SASRec", results, configs, "other") == ""
    mixtures = REPRODUCED.runs_of("similarities", "MoL", results, configs).splitlines()
    assert mixtures[2:] == ["| [made](../results/made.md) | `lane` | c | 1 | 0.8000 | 0.4000 |"]


def test_docstrings_become_lists_of_arguments() -> None:
    pytest.importorskip("griffe")
    text = "A loss.\n\nFoo ``x``.\n\nweight: how much it\ncounts. It may be 0.\nwidth, depth: sizes"
    expected = "A loss.\n\nFoo `x`.\n\n- `weight`: how much it counts. It may be 0.\n- `width, depth`: sizes"
    assert hook("docstrings").as_markdown(text) == expected
