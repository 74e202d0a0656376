"""RecBole's SASRec by its own trainer, started by `compare_peers.py` (recbole 1.2.1).

RecBole makes one row of each event and its history, and learns that event alone: a batch of 128 rows has 128 targets
where the others have up to 128 times the length. Its steps are timed over a part of an epoch; the epoch is their number
times the step.
"""

from __future__ import annotations

import time

import torch
from common import Clock, arguments
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

flags = arguments()
clock = Clock(flags.started)


def main() -> None:
    config = Config(
        model=flags.encoder,
        dataset="ratings",
        config_dict={
            "data_path": str(flags.folder / "recbole"), "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item",
            "TIME_FIELD": "timestamp", "load_col": {"inter": ["user", "item", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": flags.length, "train_batch_size": flags.batch, "hidden_size": flags.width,
            "inner_size": flags.width, "n_layers": flags.blocks, "n_heads": 1, "hidden_dropout_prob": 0.2,
            "attn_dropout_prob": 0.2, "train_neg_sample_args": None, "loss_type": "CE", "use_gpu": False,
            "show_progress": False, "epochs": 1, "topk": [10], "metrics": ["NDCG"], "valid_metric": "NDCG@10",
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}, "state": "ERROR",
            "checkpoint_dir": str(flags.folder / "recbole" / "saved"), "eval_batch_size": 256,
        },
    )  # fmt: skip
    init_seed(1, True)
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    model.train()
    clock.begin_epoch()
    for number, batch in enumerate(train):
        trainer.optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        trainer.optimizer.step()
        clock.step()
        if number >= 3 * flags.steps:
            break
    begun = time.perf_counter()
    with torch.no_grad():
        trainer.evaluate(test, load_best_model=False)
    evaluation = time.perf_counter() - begun
    settled = sorted(clock.steps[2:])
    clock.report(
        epoch=settled[len(settled) // 2] * len(train), epoch_is="steps times their number", evaluation=evaluation,
        steps=len(train),
    )  # fmt: skip


if __name__ == "__main__":
    main()
