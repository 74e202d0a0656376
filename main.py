"""Trains, evaluates and reports: ``python main.py`` runs the embedded example; ``--gin_config_file`` names another experiment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from absl import app, flags, logging

from generative_recommenders import gin_registry
from generative_recommenders.data.public_datasets import resolve
from generative_recommenders.data.preparation import prepare, prepared_path, summary
from generative_recommenders.data.sequence_dataset import SequenceDataset
from generative_recommenders.data.splits import make_split
from generative_recommenders.evaluation.collectives import Collectives
from generative_recommenders.features import UserError
from generative_recommenders.modeling.jagged import log_backend
from generative_recommenders.training import report
from generative_recommenders.training.assembly import Catalogue, build_criterion, build_model, build_sampler
from generative_recommenders.training.checkpoint import CheckpointStore
from generative_recommenders.training.run_folder import RunFolder
from generative_recommenders.training.settings import RunSettings
from generative_recommenders.training.train import Trainer, TrainResult
from generative_recommenders.visualization import plot_curves

EMBEDDED = "synthetic-books"
DEFAULT_CONFIG = Path(__file__).parent / "configs" / EMBEDDED / "sasrec.gin"

_GIN_FILE = flags.DEFINE_multi_string("gin_config_file", None, "gin file(s); the embedded example by default")
_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "gin bindings, over the files")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "train, or score a run's best checkpoint")
_DATA_ROOT = flags.DEFINE_string("data_root", "data", "where raw/ and prepared/ data sets lie")
_RUN_DIR = flags.DEFINE_string("run_dir", None, "the run's folder; runs/TIME-DATASET-ENCODER by default")
_MAX_STEPS = flags.DEFINE_integer("max_steps", None, "stop after so many steps", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "build everything, say what it is, and stop")


def prepared_dataset(name: str, data_root: Path) -> SequenceDataset:
    """The prepared data set; the embedded one is made on first use, any other must have been prepared."""
    folder = prepared_path(data_root, name)
    if not (folder / "manifest.json").exists():
        if name != EMBEDDED:
            raise UserError(f"{name} is not prepared in {folder}: python preprocess_public_data.py --dataset={name} makes it")
        logging.info("making the embedded data set %s in %s", name, folder)
        manifest = prepare(resolve(name, raw_path=None, data_root=data_root), folder)
        logging.info("%s", summary(manifest))
    return SequenceDataset.open(folder)


def dry_run(settings: RunSettings, dataset: SequenceDataset) -> None:
    t = settings.train
    split = make_split(dataset, t.protocol)
    catalogue = Catalogue.of(dataset, split.train_stops, t.category_feature)
    model = build_model(settings, catalogue)
    criterion = build_criterion(settings, catalogue)
    if criterion.needs_negatives:
        build_sampler(settings, catalogue)
    tokens = t.local_batch_size * t.max_sequence_length
    print(report.model_summary(model, t.optimizer, tokens, t.item_embedding_dim))
    print(report.data_summary(dataset, split))


def train(settings: RunSettings, resolved: str, dataset: SequenceDataset) -> None:
    t = settings.train
    split = make_split(dataset, t.protocol)
    collectives = Collectives(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with RunFolder.create_or_open(_RUN_DIR.value, False, f"{t.dataset_name}-{t.main_module}") as run:
        run.save_resolved_gin(resolved)
        logging.info("%s", report.data_summary(dataset, split))
        store = CheckpointStore(run.checkpoints, t.keep_checkpoints)
        store.attach(dataset.original_item_ids().combine_chunks(), settings.to_json(), resolved)
        trainer = Trainer(settings, dataset, split, collectives, run)
        result = trainer.train(store, _MAX_STEPS.value)
        finish(settings, dataset, split, collectives, run, store, result)


def finish(settings, dataset, split, collectives, run, store, result: TrainResult) -> None:
    t = settings.train
    rows = report.baseline_metrics(dataset, split, t, collectives)
    rows[t.main_module] = result.test
    run.write_metrics(result.progress.step, {"part": "final", **{f"test/{k}": v for k, v in result.test.items()}})
    plot_curves(result.progress.history, run.path / "curves.png")
    best = next((p for p in reversed(store.paths())), None)
    print(report.final_report(rows, dataset, split, t.seen_filter, result.progress.best_epoch, run.path, best))


def run() -> None:
    logging.set_verbosity(logging.INFO)
    log_backend()
    settings, resolved = gin_registry.load_settings(_GIN_FILE.value or [DEFAULT_CONFIG], _BINDINGS.value)
    gin_registry.log_inert(settings)
    dataset = prepared_dataset(settings.train.dataset_name, Path(_DATA_ROOT.value))
    if _DRY_RUN.value:
        dry_run(settings, dataset)
        return
    train(settings, resolved, dataset)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        print(f"unexpected arguments: {' '.join(argv[1:])}", file=sys.stderr)
        sys.exit(2)
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app.run(main)
