"""Pages of a report: one run, or several runs beside each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from absl import logging

from generative_recommenders.config.gin import differences, resolved_values
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.preparation.folder import check_file, write_text
from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.recommender import Recommender
from generative_recommenders.run.model_summary import parameter_counts
from generative_recommenders.run.report import answers, breakdown, pictures
from generative_recommenders.run.report.facts import Facts
from generative_recommenders.run.report.records import Run, conditions, machine, read_run, spent
from generative_recommenders.run.summary import COLUMNS, curve_rows

BY = "ndcg@10"
TESTED = ("hr@10", BY, "mrr")


def write_report(path: Path, output: Path | None = None) -> Path:
    """Writes the page of one run, into its folder unless ``output`` says otherwise, and returns its place.

    UserError where the run cannot be read or the page not be written.
    """
    run, place = read_run(path), output or path / "report.html"
    check_file(place)  # before the pictures, which take their time
    return _write(place, "run.html", run_page(run))


def write_comparison(paths: Sequence[Path], output: Path) -> Path:
    """Writes the page of several runs; UserError where their numbers cannot be compared."""
    runs = [read_run(path) for path in paths]
    check_file(output)
    return _write(output, "comparison.html", comparison_page(runs))


def _write(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": "{:.4f}".format,
        "signed": lambda value: f"{value:+.4f}".replace("-", "−"),
        "count": "{:,}".format,
        "zip": zip,
        "seconds": "{:,.1f}".format,
        "p": lambda p: f"{p:.4f}" if p >= 0.00095 else "< 0.001",
    }
    text = environment.get_template(template).render(values)
    write_text(path, text, errors="replace")
    return path


def run_page(run: Run) -> dict[str, Any]:
    """Values of run.html."""
    best = None if run.best_epoch is None else run.best_epoch + 1
    times, part = spent(run), run.settings.measured_part
    page = {
        "run": run,
        "title": run.name,
        "model": run.settings.model.main_module,
        "conditions": conditions(run),
        "settings": differences(RunSettings(), run.settings),
        "every_setting": resolved_values(run.settings),
        "metrics": COLUMNS,
        "plain_results": run.final.get("results", {}),
        "best": best,
        "part": part,
        "curves": pictures.curves(curve_rows(run.epochs), part, best, run.name),
        "steps": pictures.steps(run.steps),
        "machine": machine(run),
        "spent": times,
        "spent_picture": pictures.spent(times) if times else None,
        "data": None if run.facts is None else run.facts.data,
        **dict.fromkeys(("data_curves", "hit_curve", "item_map", "no_model")),
        **dict.fromkeys(("results", "compared", "groups", "examples", "maps", "parameters"), ()),
    }
    if run.facts is None:
        return page
    asked = _answers(run, run.facts)
    return {
        **page, **asked, **_measured(run.facts, to_first=True), "data_curves": pictures.data_curves(run.facts.data),
    }  # fmt: skip


def _measured(facts: Facts, to_first: bool) -> dict[str, Any]:
    """Tables and pictures of the ranks of users, by method or by run."""
    ranks = {method: facts.ranks(method) for method in facts.methods}
    kinds = (
        ("events before the target", breakdown.by_size(facts, "history_length", BY)),
        ("training events of the target", breakdown.by_size(facts, "item_events", BY)),
        ("genre", breakdown.by_genre(facts, BY)),
    )
    return {
        "users": len(facts.users),
        "tested": facts.data["users_tested"],
        "results": breakdown.results(facts),
        "compared": breakdown.compared(ranks, facts.num_items, TESTED, to_first),
        "hit_curve": pictures.hit_curve(ranks, facts.num_items),
        "groups": [(kind, found, pictures.groups(found, BY, kind)) for kind, found in kinds if found],
    }


def _answers(run: Run, facts: Facts) -> dict[str, Any]:
    """Contents that the model itself computes; the reason where it cannot."""
    try:
        recommender = Recommender.of_checkpoint(run.checkpoint, torch.device("cpu"))
        names = answers.ItemNames(facts.items)
        placed = answers.item_map(recommender, facts)
        return {
            "parameters": list(parameter_counts(recommender.model.named_children()).items()),
            "examples": answers.examples(recommender, facts, names),
            "maps": [(each, pictures.attention(each)) for each in answers.attention_maps(recommender, facts, names)],
            "item_map": None if placed is None else (placed, pictures.item_map(placed)),
        }
    except UserError as error:  # the numbers stand without it
        logging.warning("the report of %s shows nothing of its model: %s", run.path, error)
        return {"no_model": str(error)}


def comparison_page(runs: Sequence[Run]) -> dict[str, Any]:
    """Values of comparison.html; UserError where the runs are of other data, another split, or other candidates."""
    for run in runs:
        if run.facts is None:
            raise UserError(
                f"{run.path} keeps no ranks of its users: "
                f"python main.py --mode=evaluate --run_dir={run.path} writes them"
            )
        first = _measured_on(runs[0])
        for what, own in _measured_on(run).items():
            if own != first[what]:
                raise UserError(
                    f"{run.path} has {what} {own}, {runs[0].path} {first[what]}: their numbers do not compare"
                )
    facts = {name: run.facts for name, run in zip(_names(runs), runs) if run.facts is not None}
    joint = breakdown.of_common_users(facts)
    settings = [resolved_values(run.settings) for run in runs]
    rows = [(name, [each.get(name, "") for each in settings]) for name in sorted({*settings[0]}.union(*settings[1:]))]
    machines = [dict(machine(run)) for run in runs]
    return {
        "title": f"{len(runs)} runs",
        "names": list(facts),
        "runs": runs,
        "conditions": conditions(runs[0], own=False),
        "left_out": max(len(each.users) for each in facts.values()) - len(joint.users),
        "part": runs[0].settings.measured_part,
        "metrics": COLUMNS,
        "data": joint.data,
        "settings": [(name, values) for name, values in rows if any(each != values[0] for each in values)],
        "curves": pictures.compared_curves({name: curve_rows(run.epochs) for name, run in zip(facts, runs)}, BY),
        "machines": [
            (name, [each.get(name, "") for each in machines])
            for name in dict.fromkeys(key for each in machines for key in each)
        ],
        **_measured(joint, to_first=False),
    }


def _measured_on(run: Run) -> dict[str, str]:
    """What must be the same in runs whose ranks are compared."""
    assert run.facts is not None
    data = run.facts.data
    return {
        "data hash": data["data_hash"],
        "split hash": data["split"]["hash"],
        "catalogue size": f"{run.facts.num_items:,}",
        "seen filter": run.settings.evaluation.seen_filter,
    }


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of runs: the folder's, with a number where an earlier one is named so."""
    names: list[str] = []
    for run in runs:
        numbered = (f"{run.name} ({number})" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([run.name], numbered) if name not in names))
    return names
