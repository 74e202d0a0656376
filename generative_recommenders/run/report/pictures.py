"""Pictures of a report as SVG that takes the page's text colour, so that they are read in light, dark and print
alike."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.run.report.answers import AttentionMap, ItemMap
from generative_recommenders.run.report.breakdown import Group

COLOURS = ("#3f7fc1", "#dd7a2b", "#7a8a99", "#4f9d69", "#b0609f", "#b59a2c", "#cf5c5c", "#5bb3b8")
_INK = "#010203"
"""Stands for the page's text colour until a picture is written."""
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9.5, "axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True,
    "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6,
    "figure.facecolor": "none", "axes.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color",
        "axes.titlecolor"), _INK
    ),
}  # fmt: skip
Row = Mapping[str, Any]
ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "columnspacing": 1.2}
in_style = matplotlib.rc_context(_STYLE)
"""Decorates what draws: matplotlib takes its style from globals, some of it only when a picture is written."""


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def axes_of(made: Figure, columns: int) -> list[Axes]:
    """Axes beside each other."""
    return list(made.subplots(1, columns, squeeze=False).flat)


def one_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure, in inches, with axes that fill it."""
    made = figure(width, height)
    return made, made.subplots()


def svg(made: Figure, description: str) -> Markup:
    """The figure as an element of a page. description: for those who do not see it."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that this font lacks is drawn by the browser's
        # savefig would draw everything once more, to no file, before it asks for the layout
        FigureCanvasSVG(made).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' id="[a-z0-9]+(?:\.[a-z]+)?_\d+"', "", text)  # of groups, which nothing refers to
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    width = made.get_figwidth() * 96
    label = Markup('role="img" aria-label="{}" style="width: {:.0f}px"').format(description, width)
    return Markup(text.replace(_INK, "currentColor").replace("<svg ", f"<svg {label} ", 1))


def whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def add_legend(axes: Axes, **options: Any) -> None:
    """A legend whose names are taken as they are, since a title may hold a dollar sign; beside the axes unless
    placed."""
    options = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), **options}
    for text in axes.legend(**options).get_texts():
        text.set_parse_math(False)


def draw_curves(made: Figure, history: Sequence[Row], part: str, best: int | None = None) -> bool:
    """Training loss, and each metric of a part of the data, by epoch; the best epoch is marked.

    history: one mapping an epoch: ``epoch`` (its position where absent), ``train_loss``, and any other number, a metric
    under its own name, which may be None or NaN. Axes without a number are left out; False where none is left.
    """
    names = dict.fromkeys(name for row in history for name in row if name not in ("epoch", "train_loss"))
    curves = {name: _points(history, name) for name in ("train_loss", *names)}
    drawn = [["train_loss"], list(names)]
    drawn = [kept for group in drawn if (kept := [name for name in group if curves[name]])]
    if not drawn:
        return False
    for axes, group in zip(axes_of(made, len(drawn)), drawn):
        for name in group:
            axes.plot(*zip(*curves[name]), marker=".", markersize=4, label=name)
        whole_numbers(axes)
        axes.set(xlabel="epoch", title="training loss" if group == ["train_loss"] else part)
        if best is not None:
            axes.axvline(best, color=_INK, linewidth=1, linestyle="--", label=f"best epoch, {best}")
        if group != ["train_loss"]:
            add_legend(axes)
    return True


def _points(history: Sequence[Row], name: str) -> list[tuple[float, float]]:
    pairs = [(row.get("epoch", place), row.get(name)) for place, row in enumerate(history)]
    points = [(x, y) for x, y in pairs if x is not None and y is not None]  # NaN leaves a gap
    return points if any(np.isfinite(y) for _, y in points) else []


@in_style
def curves(history: Sequence[Row], part: str, best: int | None, title: str) -> Markup | None:
    """`draw_curves` of a run; None without an epoch."""
    made = figure(9.6, 3.1)
    if not draw_curves(made, history, part, best):
        return None
    return svg(made, f"Training loss and {part} metrics of {title} by epoch")


@in_style
def plot_curves(
    history: Sequence[Row], path: Path, part: str = "validation", name: str = "", best: int | None = None
) -> Path | None:
    """`draw_curves` as a PNG that appears whole or not at all; UserError where it cannot be written.

    name: of the run. Returns the path; None where there is nothing to draw.
    """
    made = figure(10, 4)
    if not draw_curves(made, history, part, best):
        return None
    made.set_facecolor("white")
    made.suptitle(name, fontsize=10, parse_math=False)
    with new_file(path) as scratch:
        made.savefig(scratch, format="png", dpi=120)
    return path


@in_style
def steps(records: Sequence[Row]) -> Markup | None:
    """Loss, learning rate, gradient norm and tokens per second by step; None without records."""
    named = {
        "train/loss": "loss of a step", "train/learning_rate": "learning rate",
        "train/gradient_norm": "gradient norm", "train/tokens_per_second": "tokens per second",
    }  # fmt: skip
    by_step = [{**record, "epoch": record["step"]} for record in records]
    found = {title: points for name, title in named.items() if len(points := _points(by_step, name)) > 1}
    if not found:
        return None
    made = figure(9.6, 2.3)
    for number, (axes, (title, points)) in enumerate(zip(axes_of(made, len(found)), found.items())):
        axes.plot(*zip(*points), color=COLOURS[number % 4], linewidth=1.1)
        axes.set(xlabel="step", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        if title in ("learning rate", "tokens per second"):
            axes.set_ylim(bottom=0)
    return svg(made, "Loss, learning rate, gradient norm and throughput by step")


@in_style
def hit_curve(ranks: Mapping[str, np.ndarray], num_items: int) -> Markup:
    """HR@K of methods over K, 1 to V. ranks: ``[n]`` by method."""
    made, axes = one_axes(5.4, 3.1)
    cutoffs = np.unique(np.geomspace(1, max(num_items, 2), 80).astype(int))
    for method, own in ranks.items():
        sorted_ranks = np.sort(own[own <= num_items])
        shares = np.searchsorted(sorted_ranks, cutoffs, side="right") / len(own)
        axes.plot(cutoffs, shares, label=shortened(method, 30))
    axes.set(xscale="log", xlabel="K", ylabel="HR@K", ylim=(0, 1.02), xlim=(1, cutoffs[-1]))
    axes.axvline(10, color=_INK, linewidth=0.8, linestyle=":")
    add_legend(axes, **ABOVE, ncols=columns_for(ranks))
    return svg(made, "Share of targets among the first K items, for every K")


@in_style
def groups(found: Sequence[Group], metric: str, xlabel: str) -> Markup:
    """Bars of groups side by side for each method, with intervals."""
    lying = len(found) > 6 or max(len(each.label) for each in found) > 14
    methods = list(found[0].values)
    made, axes = one_axes(5.4, max(2.9, 0.42 * len(found) + 0.9) if lying else 2.9)
    width = 0.82 / len(methods)
    for number, method in enumerate(methods):
        own = [each.values[method] for each in found]
        places = np.arange(len(found)) + (number - (len(methods) - 1) / 2) * width
        means = np.array([each.mean for each in own])
        errors = [means - [each.low for each in own], [each.high for each in own] - means]
        draw, error = (axes.barh, "xerr") if lying else (axes.bar, "yerr")
        draw(places, means, width * 0.92, label=shortened(method, 30), color=COLOURS[number % len(COLOURS)],
             **{error: np.clip(errors, 0, None)}, error_kw={"elinewidth": 0.9, "ecolor": _INK})  # fmt: skip
    labels = [shortened(each.label, 26) for each in found]
    if lying:
        axes.set_yticks(range(len(found)), labels, parse_math=False)
        axes.invert_yaxis()
        axes.set(xlabel=metric.upper(), xlim=(0, None))
        axes.grid(visible=False, axis="y")
    else:
        axes.set_xticks(range(len(found)), labels, parse_math=False)
        axes.set(xlabel=xlabel, ylabel=metric.upper(), ylim=(0, None))
        axes.grid(visible=False, axis="x")
    add_legend(axes, **ABOVE, ncols=columns_for(methods))
    return svg(made, f"{metric} by {xlabel}")


@in_style
def data_curves(data: Mapping[str, Any]) -> Markup:
    """Lengths of histories, popularity of items and, where there are times, when events and targets happened."""
    made, times = figure(9.6, 2.7), data["timeline"]
    lengths, popularity, *rest = axes_of(made, 2 if times is None else 3)
    draw_lengths(lengths, data["lengths"])
    draw_popularity(popularity, data["popularity"])
    for axes in rest:
        draw_timeline(axes, times, max(len(times["bins_start"]) // 3, 1), 7)
        add_legend(axes, **ABOVE, ncols=3)
    return svg(made, "Lengths of histories, popularity of items and times of events")


def draw_lengths(axes: Axes, lengths: Mapping[str, Any]) -> None:
    """The curve of `data.statistics.length_curve`."""
    shares, title = lengths["share_of_users_with_at_least"], "users with at least so many events"
    axes.step(list(map(int, shares)), list(shares.values()), where="post", marker=".")
    axes.set(xscale="log", xlabel="events", ylabel="share of users", ylim=(0, 1.02), title=title)


def draw_popularity(axes: Axes, popularity: Mapping[str, Any]) -> None:
    """The curve of `data.statistics.popularity_curve`."""
    ranks = popularity["events_by_rank"]
    axes.plot(list(map(int, ranks)), list(ranks.values()))
    scales = {"xscale": "log", "yscale": "log"}
    axes.set(**scales, xlabel="rank of the item", ylabel="events", title="popularity of items")


def draw_timeline(axes: Axes, times: Mapping[str, Any], every: int, characters: int) -> None:
    """The bins of `data.statistics.timeline`, of which every so many have so many characters of their date below."""
    dates = times["bins_start"]
    for name, counts in times["events"].items():
        if total := sum(counts):
            axes.step(range(len(dates)), [count / total for count in counts], where="post", label=name)
    marks = range(0, len(dates), every)
    axes.set_xticks(list(marks), [dates[mark][:characters] for mark in marks])
    axes.set(ylabel="share of the part")


def draw_heat_map(axes: Axes, weights: np.ndarray, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """Weights ``[len(outputs), len(inputs)]`` as a heat map with tokens on both axes; returns the image, for a colour
    bar.

    Weights below 0, as pointwise attention has, are drawn on a scale of two colours around 0.
    """
    low, high = (float(limit) for limit in (np.nanmin([0.0, *weights.flat]), np.nanmax([0.0, *weights.flat])))
    if low < -0.01 * high:
        limit = max(-low, high)
        image = axes.imshow(weights, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    else:
        image = axes.imshow(weights, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(inputs)), inputs, parse_math=False)
    axes.set_yticks(range(len(outputs)), outputs, parse_math=False)
    return image


@in_style
def attention(one: AttentionMap) -> Markup:
    """The heat map of one head."""
    count = len(one.tokens)
    made, axes = one_axes(5.2, 4.6)
    labels = [shortened(token, 20) for token in one.tokens]
    # what is not attended to at all keeps the colour of the page
    image = draw_heat_map(axes, np.where(one.weights == 0.0, np.nan, one.weights), labels, labels)
    axes.grid(visible=False)
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="x", labelrotation=90)
    axes.set(title=one.title)
    bar = made.colorbar(image, ax=axes, shrink=0.6, aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return svg(made, f"Attention weights of {one.title} over {count} tokens")


@in_style
def item_map(found: ItemMap) -> Markup:
    """Items by their place, coloured by their first genre, or by popularity where none is known."""
    made, axes = one_axes(9.0, 5.6)
    first = [each.genres[0] if each.genres else "" for each in found.items]
    names, counts = np.unique([name for name in first if name] or [""], return_counts=True)
    largest = [str(name) for name in names[np.argsort(-counts, kind="stable")][: len(COLOURS)] if name]
    x, y = found.places[:, 0], found.places[:, 1]
    if largest:
        span = np.maximum(np.ptp(found.places, axis=0), 1e-9)
        named: list[np.ndarray] = []
        other = np.array([name not in largest for name in first])
        axes.scatter(x[other], y[other], s=5, color="#9aa0a6", alpha=0.4, linewidths=0)
        for colour, name in zip(COLOURS, largest):
            own = np.array([each == name for each in first])
            axes.scatter(x[own], y[own], s=11, color=colour, alpha=0.75, linewidths=0, label=shortened(name, 24))
            place = int(np.flatnonzero(own)[0])  # of the most training events, as items come in that order
            apart = [np.abs(found.places[place] - each) / span for each in named]
            if any(across < 0.25 and along < 0.04 for across, along in apart):
                continue  # names would lie over each other
            named.append(found.places[place])
            axes.annotate(
                shortened(found.items[place].label, 26), (x[place], y[place]), xytext=(4, 4),
                textcoords="offset points", fontsize=7.5, parse_math=False,
            )  # fmt: skip
        add_legend(axes, markerscale=1.6)
    else:
        events = np.array([each.events or 0 for each in found.items])
        image = axes.scatter(x, y, s=9, c=np.log10(events + 1), cmap="viridis", alpha=0.8, linewidths=0)
        bar = made.colorbar(image, ax=axes, shrink=0.7, label="training events, log10")
        bar.outline.set_visible(False)
    axes.set_axis_off()
    return svg(made, "Items by their embeddings, in two dimensions by PCA")


@in_style
def spent(parts: Mapping[str, float]) -> Markup:
    """One bar of the run's seconds by what they were spent on."""
    made, axes = one_axes(9.6, 1.25)
    left = 0.0
    for number, (name, seconds) in enumerate(parts.items()):
        axes.barh([0], [seconds], left=left, color=COLOURS[number % len(COLOURS)], label=name)
        left += seconds
    axes.set_yticks([])
    axes.set(xlabel="seconds", xlim=(0, left or 1))
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    add_legend(axes, **ABOVE, ncols=len(parts))
    return svg(made, "Where the time went")


@in_style
def compared_curves(runs: Mapping[str, Sequence[Row]], metric: str) -> Markup | None:
    """A metric of several runs by epoch; None where no run has it."""
    found = {name: points for name, rows in runs.items() if (points := _points(rows, metric))}
    if not found:
        return None
    made, axes = one_axes(9.0, 3.1)
    for name, points in found.items():
        axes.plot(*zip(*points), marker=".", markersize=4, label=shortened(name, 48))
    axes.set(xlabel="epoch", ylabel=metric.upper())
    whole_numbers(axes)
    add_legend(axes)
    return svg(made, f"{metric} of all runs by epoch")


def columns_for(names: Iterable[str]) -> int:
    """Columns of a legend above axes of half the page: as many as its longest name leaves room for."""
    longest = max((len(shortened(name, 30)) for name in names), default=1)
    return max(1, min(3, 72 // (longest + 6)))


def shortened(text: str, width: int) -> str:
    """One line of at most so many characters, without control characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
