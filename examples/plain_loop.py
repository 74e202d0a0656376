"""A training loop of one's own: any torch optimizer learns the embedded data (`python -m examples.plain_loop`)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import SequenceLoader
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset


def train(folder: Path, steps: int = 150, make=lambda p: torch.optim.Adam(p, lr=3e-3)) -> list[float]:
    """The loss of every step. make: parameters to an optimizer."""
    if not folder.exists():
        prepare(resolve("synthetic-books", raw_path=None, data_root=folder.parent), folder)
    dataset = SequenceDataset.open(folder)
    settings = RunSettings().bind({"train_fn.loss_module": "CE"})
    stops = make_split(dataset).train_stops
    task = build_task(settings, Catalogue.of(dataset, stops))
    loader, optimizer, losses = SequenceLoader(dataset, stops, 50, 64, seed=0), make(task.parameters()), []
    for step, batch in zip(range(steps), (b for epoch in range(steps) for b in loader.epoch(epoch))):
        loss = task.loss(batch, step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print(train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data/plain-loop/books"))[::10])
