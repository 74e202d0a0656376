"""From nothing to recommendations: made ratings, a trained SASRec, answers for a reader whom it has never seen.

    python -m examples.quickstart [FOLDER]

Under a minute on two cores. ``main.py`` does the same with its flags, for longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from generative_recommenders import Recommender, train


def main(folder: Path, epochs: int = 5) -> pd.DataFrame:
    """Recommendations for a new reader; the run stays in ``folder / "run"``, and is taken from there the next time."""
    run = train(folder / "run", [f"train_fn.num_epochs = {epochs}"], data_root=folder / "data", auto_resume=True)
    recommender = Recommender.load(run)
    read = recommender.item_ids[:3].to_pylist()  # ids as they stand in the data
    print(recommender.similar_items(read[:1], k=3))
    return recommender.recommend({"a new reader": read}, k=5)


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "tmp/quickstart")))
