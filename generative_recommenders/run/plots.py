"""Curves of a run as a PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, float | int | None]


def plot_curves(history: Sequence[Row], path: str | os.PathLike[str], part: str = "validation") -> Path:
    """Training loss and the metrics of a part of the data by epoch, as a PNG that appears whole or not at all.

    history: one mapping an epoch: ``epoch`` (its position where absent), ``train_loss``, and any other
        number, each drawn as a metric under its own name. A name may be absent, None or NaN in some epochs:
        the curve skips them.
    path: the PNG; its folder must exist. Returns the path.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(1, 2)
    _draw(loss_axes, history, ["train_loss"], "training loss")
    names = dict.fromkeys(name for row in history for name in row if name not in ("epoch", "train_loss"))
    _draw(metric_axes, history, list(names), part)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _draw(axes: Axes, history: Sequence[Row], names: Sequence[str], title: str) -> None:
    for name in names:
        points = [(row.get("epoch", i), row.get(name)) for i, row in enumerate(history)]
        drawn = [(epoch, value) for epoch, value in points if epoch is not None and value is not None]
        if drawn:
            axes.plot(*zip(*drawn), marker=".", label=name)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
