"""Measured numbers in the documentation: tables made of benchmarks/results/*.json and of the rows of results pages.

A page asks by a line of its own, ``<!-- measured: NAME ARGUMENTS -->``; what is asked for and is not there stops the
build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
RECORDS = DOCS.parent / "benchmarks" / "results"
MARK = re.compile(r"^<!-- measured: (\w+) ?(.*?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](mark[2]), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


def rows_of(asked: str) -> str:
    """``PAGE # HEADING # BEGINNING # ...``: the rows of the first table under the heading that begin so, with its
    head."""
    page, heading, *beginnings = (each.strip() for each in asked.split("#"))
    text = (DOCS / "results" / f"{page}.md").read_text()
    section = re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    kept = [line for line in lines[2:] if line.strip("| *").startswith(tuple(beginnings))]
    if not kept:
        raise KeyError(f"no row of {page}, {heading!r} begins with {beginnings}")
    anchor = re.sub(r"[^a-z0-9-]+", "", heading.lower().replace(" ", "-"))
    return "\n".join([*lines[:2], *kept, "", f"Data, command and machine: [{heading}](../results/{page}.md#{anchor})."])


def steps(encoders: str) -> str:
    """Steps on a CPU and on a GPU, and appending to encoded histories, of encoders by name."""
    names, runs = [each.strip() for each in encoders.split(",")], dict[tuple[str, str], list[Any]]()
    for each in record("train_step")["results"]:
        block = each["negatives_block_size"]
        sharing = "each position" if each["negatives_sharing"] == "position" else f"every {block} positions"
        if each["encoder"] in names and each["profile"] == "ml-1m":
            label = f"{each['encoder']}, CPU", f"{each['num_negatives']} negatives for {sharing}"
            runs.setdefault(label, []).append(each)
    lines = [
        (
            ", ".join(label),
            ", ".join(f"{1000 * each['step_seconds']:.0f}" for each in found),
            f"{max(each['tokens_per_second'] for each in found):,}",
            f"{max(each['peak_rss_mb'] for each in found):,}",
        )
        for label, found in runs.items()
    ]
    card = record("gpu")["machine"]["card"]
    for name, each in record("gpu")["steps"].items():
        if name in names:
            lines.append(
                (
                    f"{name}, {card}",
                    each["step_ms"],
                    f"{each['tokens_per_second']:,}",
                    f"{each['peak_mb']:,.0f}",
                )
            )
    return table(("a training step", "ms, median of each run", "tokens a second, at best", "peak memory, MB"), lines)


def appending(names: str) -> str:
    """Appending one event to encoded histories, of the encoders that can."""
    results = record("incremental")["results"]
    chosen = [each.strip() for each in names.split(",")] if names else list(results)
    return table(
        ("one event more for 128 histories of 200", "encoded anew, ms", "appended, ms", "times faster"),
        [(n, r["scratch_ms"], r["append_ms"], r["ratio"]) for n, r in results.items() if n in chosen],
    )


def gpu_steps(_: str) -> str:
    graphs = record("gpu")["steps"]
    return table(
        (
            "ML-1M's shape, batch 128 of 200",
            "ms a step",
            "tokens a second",
            "peak memory, MB",
            "ms without CUDA graphs",
        ),
        [
            (
                name,
                each["step_ms"],
                f"{each['tokens_per_second']:,}",
                f"{each['peak_mb']:,.0f}",
                graphs[f"{name}, no graphs"]["step_ms"],
            )
            for name, each in graphs.items()
            if not name.endswith("no graphs")
        ],
    )


def gpu_books(_: str) -> str:
    return table(
        ("801,350 items", "ms a step", "peak memory, MB", "copies of the table in that time"),
        [
            (name, each["step_ms"], f"{each['peak_mb']:,.0f}", each["table_passes_in_that_time"])
            for name, each in record("gpu")["books"].items()
        ],
    )


def gpu_losses(_: str) -> str:
    return table(
        ("cross-entropy over the catalogue", "ms", "multiples of its matrix products", "memory, MB"),
        [
            (name, each["ms"], each["multiples_of_the_products"], f"{each['memory_mb']:,.0f}")
            for name, each in record("gpu")["catalogue losses"].items()
        ],
    )


def gpu_summary(_: str) -> str:
    found = record("gpu")
    rates, epochs, machine = found["rates"], found["epochs"], found["machine"]
    differences = [max(pair) for pair in found["parity"]["differences"].values()]
    evaluations = ", ".join(f"{name} {each['seconds']} s" for name, each in found["evaluation"].items())
    return "\n".join(
        [
            f"{machine['card']}, torch {machine['torch']}, commit `{machine['commit']}`, {machine['date']}; "
            f"`{found['command']}`; data {found['data']}.",
            "",
            f"- The card copies {rates['copy_gb_s']:,.0f} GB/s and multiplies {rates['float32_tflops']:.0f} TFLOPS in "
            f"float32, {rates['tf32_tflops']:.0f} in TF32, {rates['bfloat16_tflops']:.0f} in bfloat16.",
            f"- {len(differences)} combinations of encoders, losses and sharing give the losses and gradients "
            f"of the CPU to {max(differences):.1e} relative (bound {found['parity']['tolerance']}).",
            f"- {epochs['epochs_measured']} epochs of HSTU-large, exact evaluation after each: {epochs['seconds']:.0f} "
            f"s, of which {epochs['training_seconds']:.0f} s training.",
            f"- Exact evaluation of {found['evaluation']['SASRec']['users']:,} users: {evaluations}.",
        ]
    )


def top_k(_: str) -> str:
    found = record("top_k")
    setup = found["setup"]
    head = f"{setup['items']:,} items, {setup['queries']} queries, k {setup['k']}, {setup['threads']} thread"
    return table(
        (head, "s a search", "share of the exact answer found"),
        [(n, r["search_seconds"], r.get("recall", "exact")) for n, r in found["results"].items()],
    )


def peers(_: str) -> str:
    """Beside other programs; nothing where they were not measured."""
    if not (RECORDS / "peers.json").exists():
        return ""
    found = record("peers")
    figures = {"step": "step, s", "epoch": "epoch, s", "evaluation": "evaluation, s"}
    figures |= {"first_step": "start to first step, s", "peak_rss_mb": "peak memory, MB"}

    def cell(value: float | None, ours: float | None, own: bool) -> str:
        times = "" if own or not value or not ours else f" ({value / ours:.1f}x)"
        return "" if value is None else f"{value:,.3g}{times}" if value < 100 else f"{value:,.0f}{times}"

    rows = []
    for encoder, systems in found["results"].items():
        ours = systems["ours"]
        for name, each in systems.items():
            cells = (cell(each.get(figure), ours.get(figure), name == "ours") for figure in figures)
            rows.append((f"{encoder}, {found['packages'].get(name, name)}", *cells))
        floors = (cell(ours.get(f"{figure}_floor"), None, True) for figure in figures)
        rows.append((f"*{encoder}, floor*", *floors))
    said = (
        f"{found['users']:,} users of ML-1M's lengths, {found['items']:,} items, torch {found['torch']}, commit "
        f"`{found['commit']}`, {found['date']}: `python benchmarks/compare_peers.py --users={found['users']}`; times "
        "ours in brackets. The floor of an evaluation is its matrix products alone, that of memory the imported "
        "libraries with the weights, gradients and moments. "
        "RecBole has a row for each prefix of a history, so that its step predicts 128 targets where the others "
        "predict one at every position, and its epoch, computed from 25 steps, has 1,548 of them instead of 10."
    )
    return "## Beside other programs\n\n" + said + "\n\n" + table(("", *figures.values()), rows)


TABLES: dict[str, Callable[[str], str]] = {
    each.__name__: each for each in (steps, appending, gpu_steps, gpu_books, gpu_losses, gpu_summary, top_k, peers)
} | {"rows": rows_of}
