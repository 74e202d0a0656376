"""The loss of the first step of a published configuration, which its initialisation decides."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from generative_recommenders.build import parts  # noqa: F401  (registers what the bindings choose)
from generative_recommenders.config.gin import load_settings
from generative_recommenders.data.splits import make_split
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.trainer import Trainer
from tiny_data import ragged_sequences, tiny_dataset

ML_1M = Path(__file__).resolve().parents[2] / "configs" / "ml-1m"


def test_a_mixture_of_logits_begins_near_the_loss_of_a_uniform_guess(tmp_path: Path) -> None:
    """As published; tables of user ids drawn from a unit normal made it 11.7."""
    dataset = tiny_dataset(tmp_path, ragged_sequences(64, 200, seed=5))
    sizes = ["train_fn.local_batch_size = 64", "train_fn.max_sequence_length = 20"]
    settings, _ = load_settings([ML_1M / "sasrec-mol-sampled-softmax-n128-8x4x64-rails-final.gin"], sizes)
    torch.manual_seed(42)
    trainer = Trainer(settings, dataset, make_split(dataset), Collectives())
    batch = next(iter(trainer.loader.epoch(0)))
    loss = float(trainer.run_step(batch).loss)
    uniform = math.log(1 + settings.negatives.num_negatives)
    assert uniform - 0.1 < loss < uniform + 1, loss
