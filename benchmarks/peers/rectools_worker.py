"""RecTools' models by their own `fit` and `recommend`, started by `compare_peers.py` (rectools 0.19)."""

from __future__ import annotations

import time

import pandas as pd
from common import Clock, arguments
from pytorch_lightning import Callback, Trainer
from rectools.dataset import Dataset
from rectools.dataset.context import get_context
from rectools.models import HSTUModel, SASRecModel

flags = arguments()
clock = Clock(flags.started)


class Ticks(Callback):
    def on_train_epoch_start(self, trainer, module) -> None:
        clock.begin_epoch()

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        clock.step()

    def on_train_epoch_end(self, trainer, module) -> None:
        clock.end_epoch()


def trainer() -> Trainer:
    return Trainer(
        max_epochs=2, accelerator="cpu", devices=1, callbacks=[Ticks()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


def main() -> None:
    frame = pd.read_csv(flags.folder / "ratings.csv")
    frame.columns = ["user_id", "item_id", "datetime"]
    frame["datetime"], frame["weight"] = pd.to_datetime(frame["datetime"], unit="s"), 1.0
    dataset = Dataset.construct(frame)
    kinds = {"SASRec": SASRecModel, "HSTU": HSTUModel}
    options = {"relative_time_attention": True, "relative_pos_attention": True} if flags.encoder == "HSTU" else {}
    model = kinds[flags.encoder](
        n_blocks=flags.blocks, n_heads=1, n_factors=flags.width, session_max_len=flags.length,
        batch_size=flags.batch, dropout_rate=0.2, loss="softmax", lr=1e-3, get_trainer_func=trainer, **options,
    )  # fmt: skip
    model.fit(dataset)
    begun = time.perf_counter()
    users = frame["user_id"].unique()
    last = frame.groupby("user_id", as_index=False)["datetime"].max()  # HSTU asks for the request's time
    context = get_context(last.assign(weight=1.0, item_id=0)) if flags.encoder == "HSTU" else None
    found = model.recommend(users, dataset, k=10, filter_viewed=True, context=context)
    clock.report(evaluation=time.perf_counter() - begun, answers=len(found))


if __name__ == "__main__":
    main()
