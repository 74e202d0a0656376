"""Curves of a run as a PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from generative_recommenders.run.report.pictures import Row, draw_curves, figure


def plot_curves(
    history: Sequence[Row],
    path: str | os.PathLike[str],
    part: str = "validation",
    name: str = "",
    best: int | None = None,
) -> Path | None:
    """Training loss and the metrics of a part of the data by epoch, as a PNG that appears whole or not at all.

    history, part, best: see `draw_curves`. path: the PNG; its folder must exist. name: of the run. Returns the path; None where
    there is nothing to draw.
    """
    made = figure(10, 4)
    if not draw_curves(made, history, part, best):
        return None
    made.patch.set(alpha=1, facecolor="white")
    made.suptitle(name, fontsize=10, parse_math=False)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        made.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
