"""A file of one's own: prepared, learned and answered for, in the ids of the file.

    python -m examples.own_csv ratings.csv [FOLDER] [COLUMNS]

COLUMNS are those of the file in the words of ``--columns``, as ``user=who,item=what,timestamp=when``; a header with
known names needs none. Delimiter, header and the unit of times are found out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from generative_recommenders import Recommender, SequenceDataset, prepare, train
from generative_recommenders.data.readers.events import ReadOptions
from generative_recommenders.data.sources.public import resolve


def main(file: Path, folder: Path, columns: str | None = None, epochs: int = 20) -> pd.DataFrame:
    """Ten recommendations for each of the first five users; a run of the same file in the folder is resumed."""
    data = folder / "prepared" / "own"
    prepare(resolve("csv", raw_path=file, data_root=folder, options=ReadOptions(columns)), data)
    bindings = [
        "train_fn.dataset_name = 'own'", f"train_fn.num_epochs = {epochs}", "train_fn.early_stopping_patience = 3",
    ]  # fmt: skip
    run = train(folder / "run", bindings, data_root=folder, auto_resume=True)
    dataset = SequenceDataset.open(data)
    users, items = dataset.original_user_ids()[:5].to_pylist(), dataset.original_item_ids().to_pylist()
    histories = {}
    for number, user in enumerate(users):
        events = dataset.items[dataset.offsets[number] : dataset.offsets[number + 1]]
        histories[user] = [items[item - 1] for item in events]  # ids inside are 1..V
    return Recommender.load(run).recommend(histories, k=10)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = sys.argv[3] if len(sys.argv) > 3 else None
    print(main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "tmp/own"), given))
