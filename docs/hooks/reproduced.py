"""Reproduced figures in the documentation: what the JSON files below docs/results say of the runs that chose a part.

A page asks by a line of its own, ``<!-- reproduced: KIND NAME -->`` or, for one data set,
``<!-- reproduced: KIND NAME DATA -->``, and gets a table, or nothing where there are no runs yet.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from generative_recommenders.commands.ablation.plan import AblationSettings  # noqa: E402
from generative_recommenders.config.gin import load_ablation  # noqa: E402
from generative_recommenders.config.registry import REGISTRIES  # noqa: E402

RESULTS, CONFIGS = ROOT / "docs" / "results", ROOT / "configs" / "reproduce"
MARK = re.compile(r"^<!-- reproduced: (\w+) (\S+)(?: (\S+))? -->$", re.MULTILINE)
HEAD = "| data | lane | run | seeds | HR@10 | NDCG@10 |\n| --- | --- | --- | --- | --- | --- |"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables."""
    return MARK.sub(lambda mark: runs_of(mark[1], mark[2], data=mark[3]), markdown)


def runs_of(kind: str, name: str, results: Path = RESULTS, configs: Path = CONFIGS, data: str | None = None) -> str:
    """A line for each cell whose run chose the part, best NDCG@10 first in a lane. Figures are of the test item.

    data: the name of one data set; all of them where None.
    """
    registry = REGISTRIES[kind]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for path in sorted(results.glob(f"{data or '*'}/*.json")):
        record = json.loads(path.read_text())
        if "test" in record and (results / f"{path.parent.name}.md").exists():
            file = configs / path.parent.name / f"{record['lane']}.gin"
            chosen = chosen_parts(file, tuple(record["bindings"]))
            if chosen.get(kind) in registry and registry[chosen[kind]] is registry[name]:
                found[path.parent.name, record["lane"], record["cell"]].append(record["test"])
    means = {
        key: (len(runs), *(statistics.mean(run[metric] for run in runs) for metric in ("hr@10", "ndcg@10")))
        for key, runs in found.items()
    }
    rows = [
        f"| [{of}](../results/{of}.md) | `{lane}` | {cell} | {count} | {hits:.4f} | {gain:.4f} |"
        for (of, lane, cell), (count, hits, gain) in sorted(means.items(), key=lambda item: (*item[0][:2], -item[1][2]))
    ]
    return f"{HEAD}\n" + "\n".join(rows) if rows else ""


@cache
def chosen_parts(file: Path, bindings: tuple[str, ...]) -> dict[str, str]:
    """Kind of parts -> the name that a cell of a lane's file chooses; of encoders, losses and similarities."""
    if not file.exists():
        return {}
    _, settings = load_ablation(file, bindings, AblationSettings.model_fields)
    return {
        "encoders": settings.model.main_module,
        "losses": settings.loss.loss_module,
        "similarities": settings.model.interaction_module_type or "DotProduct",
    }
