# ruff: noqa: E402 - what needs the extra is imported after the check for it
"""Lightning over this program's tasks and over RePlay's models; needs the extra ``lightning``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars
import pytest
import torch

lightning = pytest.importorskip("lightning")

from generative_recommenders.build.parts import build_model, build_task
from generative_recommenders.compat.replay.nn.lightning.postprocessor import (
    PostprocessorBase,
    SeenItemsFilter,
)
from generative_recommenders.compat.replay.nn.sequential import SasRec, TwoTower
from generative_recommenders.compat.replay.nn.transform.template import make_default_sasrec_transforms
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.lightning import (
    ComputeMetricsCallback,
    DataModule,
    HiddenStatesCallback,
    LambdaLRSchedulerFactory,
    LightningModule,
    LRSchedulerFactory,
    OptimizerFactory,
    PandasTopItemsCallback,
    ParquetModule,
    PolarsTopItemsCallback,
    SparkTopItemsCallback,
    TorchTopItemsCallback,
    parquet,
)
from generative_recommenders.lightning.parquet import prepared_table
from generative_recommenders.training.trainer import Trainer
from replay_scenes import item_schema
from tiny_data import ragged_sequences, tiny_dataset
from tiny_models import settings

NUM_ITEMS, PADDING = 30, 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"), ragged_sequences(57, NUM_ITEMS, seed=5))


def trainer(tmp_path: Path, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks), **{"enable_checkpointing": False, **options},
    )  # fmt: skip


class Losses(lightning.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def chosen(**options: Any) -> RunSettings:
    return settings(
        **{
            "dataset_name": "tiny",
            "max_sequence_length": 10,
            "local_batch_size": 8,
            "num_epochs": 2,
            "learning_rate": 1e-2,
            "num_warmup_steps": 0,
            "dropout_rate": 0.2,
            "num_negatives": 8,
            **options,
        }
    )


@pytest.mark.parametrize(
    "options",
    [{"loss_module": "CE"}, {"sampling_strategy": "local"}, {"loss_module": "CE", "objective": "masked"}],
    ids=["catalogue", "sampled", "masked"],
)
def test_the_losses_and_metrics_are_those_of_main(tmp_path: Path, dataset: SequenceDataset, options: dict) -> None:
    run = chosen(**options)
    own, losses = DataModule(dataset.folder, run), Losses()
    main = Trainer(run, dataset, own.split, Collectives())
    expected = []
    main.model.train()
    for epoch in range(run.schedule.num_epochs):
        expected += [float(main.run_step(batch).loss) for batch in main.loader.epoch(epoch)]

    lightning.seed_everything(run.schedule.random_seed, verbose=False)
    module = LightningModule(
        build_task(run, own.catalogue()),
        OptimizerFactory("adamw", run.updates.learning_rate, run.updates.weight_decay),
    )
    metrics = ComputeMetricsCallback(["ndcg", "recall", "mrr"], [1, 10], [SeenItemsFilter(NUM_ITEMS + 1)], NUM_ITEMS)
    fit = trainer(tmp_path, losses, metrics, max_epochs=run.schedule.num_epochs)
    fit.fit(module, own)
    np.testing.assert_allclose(losses.values, expected, rtol=1e-4)
    ranked = ModelEvaluation(run, dataset, own.split, Collectives()).validation(main.model).metrics()
    ours = fit.callback_metrics
    for name, mine in (("ndcg@10", "ndcg@10"), ("hr@10", "recall@10"), ("hr@1", "recall@1")):
        assert float(ours[mine]) == pytest.approx(ranked[name], abs=1e-6), name
    tested = trainer(tmp_path, metrics).test(module, own, verbose=False)[0]
    ranked = ModelEvaluation(run, dataset, own.split, Collectives()).test(main.model).metrics()
    assert tested["ndcg@10"] == pytest.approx(ranked["ndcg@10"], abs=1e-6)


def test_recommendations_of_a_model_alone_in_the_users_own_ids(tmp_path: Path, dataset: SequenceDataset) -> None:
    run = chosen(loss_module="CE")
    own = DataModule(dataset.folder, run)
    model = build_model(run, own.catalogue()).eval()
    module, hidden = LightningModule(model), HiddenStatesCallback(0)
    callbacks = [
        kind(3, "query_id", "item_id", postprocessors=[SeenItemsFilter(NUM_ITEMS + 1)])
        for kind in (PandasTopItemsCallback, PolarsTopItemsCallback)
    ]
    trainer(tmp_path, hidden, *callbacks).predict(module, own, return_predictions=False)
    frame, other = (each.get_result() for each in callbacks)
    assert other.equals(polars.from_pandas(frame))
    assert hidden.get_result().shape == (57, 8)
    assert set(frame["item_id"]) <= set(range(1, NUM_ITEMS + 1))
    first = frame[frame["query_id"] == 2]
    mine = dataset.items[dataset.offsets[1] : dataset.offsets[2]]
    assert not set(first["item_id"]) & set(mine.tolist())
    assert first["rating"].is_monotonic_decreasing
    named = own.original_ids(frame)
    assert own.original_ids(other).equals(polars.from_pandas(named))
    assert named["query_id"].iloc[0] == f"u{frame['query_id'].iloc[0] - 1:05}" and set(named["item_id"]) <= {
        f"i{item:05}" for item in range(1, NUM_ITEMS + 1)
    }
    with pytest.raises(UserError, match="build_task"):
        trainer(tmp_path, max_steps=1).fit(LightningModule(model), own)


def tables(dataset: SequenceDataset, **options: Any) -> ParquetModule:
    item, truth = {"shape": 11, "padding": PADDING}, {"shape": 1, "padding": -1}
    evaluated = {
        "query_id": {}, "item_id": item, "ground_truth": truth, "train": {"shape": 40, "padding": -1},
    }  # fmt: skip
    metadata = {
        "train": {"query_id": {}, "item_id": {"shape": 12, "padding": PADDING}},
        "validate": evaluated,
        "test": evaluated,
        "predict": {name: evaluated[name] for name in ("query_id", "item_id", "train")},
    }
    transforms = make_default_sasrec_transforms(item_schema(NUM_ITEMS))
    return ParquetModule(16, metadata, transforms, prepared_folder=dataset.folder, **options)


def replay_model(name: str) -> torch.nn.Module:
    torch.manual_seed(2)
    options = {"embedding_dim": 16, "num_heads": 2, "num_blocks": 1, "max_sequence_length": 11, "dropout": 0.0}
    if name == "SasRec":
        return SasRec.from_params(item_schema(NUM_ITEMS), **options)
    return TwoTower.from_params(item_schema(NUM_ITEMS), {"item_id": torch.arange(NUM_ITEMS)}, **options)


@pytest.mark.parametrize("name", ["SasRec", "TwoTower"])
def test_models_of_replay_learn_and_answer(tmp_path: Path, dataset: SequenceDataset, name: str) -> None:
    module = LightningModule(replay_model(name), OptimizerFactory(learning_rate=0.02), LRSchedulerFactory(1, 0.5))
    seen = [SeenItemsFilter(NUM_ITEMS, "train")]
    metrics = ComputeMetricsCallback(["ndcg", "novelty", "coverage", "precision"], [1, 5], seen, item_count=NUM_ITEMS)
    losses, top = Losses(), PandasTopItemsCallback(5, "query_id", "item_id", postprocessors=seen)
    tensors, hidden = TorchTopItemsCallback(5, seen), HiddenStatesCallback(0)
    best = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="ndcg@5", mode="max")
    fit = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
        callbacks=[metrics, losses, best, top, tensors, hidden],
    )  # fmt: skip
    data = tables(dataset)
    fit.fit(module, datamodule=data)
    assert np.mean(losses.values[-3:]) < np.mean(losses.values[:3])
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 / 8)
    measured = fit.callback_metrics
    assert 0.95 < measured["novelty@5"] < 1.0  # one user has seen nearly everything, and gets fewer than 5 items
    assert 0 < measured["coverage@5"] <= 1
    restored = LightningModule.load_from_checkpoint(best.best_model_path, model=replay_model(name))
    (again,) = trainer(tmp_path, metrics).validate(restored, datamodule=data, verbose=False)
    assert again["ndcg@5"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    fit.predict(module, datamodule=data)
    frame, (items, scores) = top.get_result(), tensors.get_result()
    assert len(frame) == 57 * 5 - int((scores == -torch.inf).sum())
    assert hidden.get_result().shape == (57, 11, 16)
    whole = frame[frame["query_id"] == 4]
    assert whole["item_id"].tolist() == items[4].tolist()
    assert not set(whole["item_id"]) & set((dataset.items[dataset.offsets[4] : dataset.offsets[5]] - 1).tolist())


def test_metrics_are_those_of_a_loop_over_users(tmp_path: Path, dataset: SequenceDataset) -> None:
    module, data = LightningModule(replay_model("SasRec")), tables(dataset)
    metrics = ComputeMetricsCallback(["map", "mrr", "recall", "ndcg"], [3])
    (measured,) = trainer(tmp_path, metrics).validate(module, datamodule=data, verbose=False)
    model, ranks = module.model.eval(), []
    for user in range(57):
        items = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]] - 1
        place = data_split(data).validation_targets[user]
        if place < 0:
            continue
        window = torch.from_numpy(np.asarray(items[max(0, place - 11) : place])).long()[None]
        logits = model({"item_id": window}, torch.ones_like(window, dtype=torch.bool)).logits[0]
        ranks.append(1 + int((logits > logits[int(items[place])]).sum()))
    ranks = np.array(ranks)
    hits = ranks <= 3
    assert measured["recall@3"] == pytest.approx(hits.mean(), abs=1e-6)
    assert measured["mrr@3"] == pytest.approx((hits / ranks).mean(), abs=1e-6)
    assert measured["map@3"] == pytest.approx((hits / ranks).mean(), abs=1e-6)
    assert measured["ndcg@3"] == pytest.approx((hits / np.log2(ranks + 1)).mean(), abs=1e-6)


def data_split(data: ParquetModule) -> Any:
    from generative_recommenders.data.splits import make_split

    return make_split(SequenceDataset.open(data.prepared_folder), data.protocol)


def test_candidates_are_scored_alone(tmp_path: Path, dataset: SequenceDataset) -> None:
    module, data = LightningModule(replay_model("SasRec")), tables(dataset)
    candidates = torch.tensor([7, 3, 21, 11])
    assert module.candidates_to_score is None
    module.candidates_to_score = candidates
    top = TorchTopItemsCallback(2, [SeenItemsFilter(NUM_ITEMS, "train")], query_column="query_id")
    trainer(tmp_path, top).predict(module, datamodule=data, return_predictions=False)
    queries, items, _ = top.get_result()
    assert queries.tolist() == list(range(57)) and set(items.unique().tolist()) <= set(candidates.tolist())
    for wrong in (torch.tensor([1, 1]), torch.tensor([[1]]), torch.tensor([0.5]), torch.tensor([-1, 1])):
        with pytest.raises(UserError, match="distinct item ids"):
            module.candidates_to_score = wrong
    run = chosen(loss_module="CE")
    own = DataModule(dataset.folder, run)
    program = LightningModule(build_model(run, own.catalogue()))
    program.candidates_to_score = candidates
    top = TorchTopItemsCallback(4)
    trainer(tmp_path, top).predict(program, own, return_predictions=False)
    assert set(top.get_result()[0].unique().tolist()) == set(candidates.tolist())


@pytest.mark.parametrize("by", ["module", "batch", "both"])
def test_candidates_of_a_batch_come_before_those_of_the_module(tmp_path: Path, by: str) -> None:
    class Asked(PostprocessorBase):
        def on_validation(self, batch: Any, logits: torch.Tensor) -> torch.Tensor:
            assert self.candidates.tolist() == [17, 4, 11]
            return logits

        on_prediction = on_validation

    module, candidates = LightningModule(replay_model("SasRec")), torch.tensor([17, 4, 11])
    items = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = {
        "feature_tensors": {"item_id": items}, "padding_mask": torch.ones_like(items, dtype=torch.bool),
        "query_id": torch.tensor([8, 9]), "ground_truth": torch.tensor([[17], [2]]),
    }  # fmt: skip
    if by != "module":
        batch["candidates_to_score"] = candidates
    module.candidates_to_score = {"module": candidates, "batch": None, "both": torch.tensor([4])}[by]
    metrics, top = ComputeMetricsCallback(["recall"], [3], [Asked()]), PandasTopItemsCallback(3, "query_id", "item_id")
    top.postprocessors = [Asked()]
    run = trainer(tmp_path, metrics, top)
    assert run.validate(module, loader([batch]), verbose=False)[0]["recall@3"] == 0.5
    run.predict(module, loader([batch]))
    assert [{*rows} for _, rows in top.get_result().groupby("query_id")["item_id"]] == [{4, 11, 17}] * 2
    batch["candidates_to_score"] = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"candidates_to_score must be .* not torch.int64 \[2, 3\]"):
        run.predict(module, loader([batch]))


def test_batches_whose_gradients_are_accumulated_have_draws_of_their_own(
    tmp_path: Path, dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = chosen(sampling_strategy="local")
    own = DataModule(dataset.folder, run)
    task = build_task(run, own.catalogue())
    steps: list[int] = []
    loss = task.loss
    monkeypatch.setattr(task, "loss", lambda batch, step: steps.append(step) or loss(batch, step))
    trainer(tmp_path, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=2).fit(LightningModule(task), own)
    assert len({*steps}) == len(steps) == len(own.train_dataloader())
    assert steps[::2] == [*range(len(steps[::2]))]  # the first batch of each step draws as without accumulation


def test_a_fit_resumes_where_it_was(tmp_path: Path, dataset: SequenceDataset, recwarn: pytest.WarningsRecorder) -> None:
    """In the middle of an epoch, and after one."""
    run = chosen(sampling_strategy="local")

    def losses(start: str | None, *callbacks: lightning.Callback) -> list[float]:
        lightning.seed_everything(0, verbose=False)
        own, kept = DataModule(dataset.folder, run), Losses()
        options = {"enable_checkpointing": bool(callbacks), "max_epochs": 2, "limit_val_batches": 0}
        fit = trainer(tmp_path, kept, *callbacks, **options)
        fit.fit(LightningModule(build_task(run, own.catalogue())), own, ckpt_path=start)
        return kept.values

    every = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    whole = losses(None, every)
    an_epoch = len(whole) // 2
    for step in (2, an_epoch, an_epoch + 1):
        assert losses(str(tmp_path / f"step={step}.ckpt")) == whole[step:], step
    assert not [each for each in recwarn if "not resumable" in str(each.message)]


def test_the_training_batches_are_whole_after_a_fit(tmp_path: Path, dataset: SequenceDataset) -> None:
    run = chosen()
    own = DataModule(dataset.folder, run)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(LightningModule(build_task(run, own.catalogue())), own)
    batches = own.train_dataloader()
    assert len(list(batches)) == len(batches) > 1


class Given(torch.nn.Module):
    """Scores that the batch holds."""

    def forward(self, scores, **arguments):
        return {"logits": scores, "hidden_states": ()}


def loader(batches: list[dict[str, torch.Tensor]]) -> torch.utils.data.DataLoader:
    """One loader of these batches; a list of them would be several loaders."""
    return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class OfAllItems(Given):
    """The same without candidates."""

    def forward(self, scores):
        return super().forward(scores)


def test_candidates_reach_a_model_that_takes_anything_and_are_refused_by_one_that_takes_none(
    tmp_path: Path,
) -> None:
    class Kept(Given):
        def forward(self, scores, **arguments):
            self.arguments = arguments
            return super().forward(scores)

    candidates, batch = torch.tensor([7, 3]), {"scores": torch.zeros(1, 2), "ground_truth": torch.ones(1, 1)}
    module = LightningModule(Kept()).eval()
    module.candidates_to_score = candidates
    module(batch)
    assert module.model.arguments["candidates_to_score"] is candidates
    module = LightningModule(OfAllItems()).eval()
    module.candidates_to_score = candidates
    with pytest.raises(UserError, match="OfAllItems takes no candidates_to_score"):
        module(batch)


def test_a_later_batch_may_list_a_candidate_with_a_larger_id(tmp_path: Path) -> None:
    module = LightningModule(Given())
    module.candidates_to_score = torch.tensor([3, 7, 21])
    batches = [
        {"scores": torch.eye(3)[[column]], "ground_truth": torch.tensor([[wanted, 21]])}
        for column, wanted in ((0, 3), (2, 7))
    ]
    metrics = ComputeMetricsCallback(["recall"], [1])
    (measured,) = trainer(tmp_path, metrics).validate(module, loader(batches), verbose=False)
    assert measured["recall@1"] == 0.5


def test_a_batch_may_have_fewer_candidates_than_are_asked_for(tmp_path: Path) -> None:
    batches = [
        {"scores": torch.tensor([[0.5, 2.0, 1.0]]), "user": torch.tensor([8])},
        {"scores": torch.tensor([[4.0]]), "candidates_to_score": torch.tensor([7]), "user": torch.tensor([9])},
    ]
    top = PandasTopItemsCallback(2, "user", "item")
    trainer(tmp_path, top).predict(LightningModule(Given()), loader(batches))
    assert top.get_result().to_dict("list") == {"user": [8, 8, 9], "item": [1, 2, 7], "rating": [2.0, 1.0, 4.0]}


def test_half_precision_scores_are_shown(tmp_path: Path) -> None:
    batches = [{"scores": torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.bfloat16), "user": torch.tensor([8])}]
    pandas, polars_ = (kind(2, "user", "item") for kind in (PandasTopItemsCallback, PolarsTopItemsCallback))
    trainer(tmp_path, pandas, polars_).predict(LightningModule(Given()), loader(batches))
    assert pandas.get_result().to_dict("list") == {"user": [8, 8], "item": [1, 2], "rating": [2.0, 1.0]}
    assert polars_.get_result()["rating"].to_list() == [2.0, 1.0]


class Forbid(PostprocessorBase):
    """Forbids one item in validation and another one in prediction."""

    def __init__(self, in_validation: int, in_prediction: int) -> None:
        self.items = {"validation": in_validation, "prediction": in_prediction}

    def on_validation(self, batch: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(1, torch.tensor(self.items["validation"]), -torch.inf)

    def on_prediction(self, batch: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(1, torch.tensor(self.items["prediction"]), -torch.inf)


def test_postprocessors_are_told_validation_from_prediction(tmp_path: Path, dataset: SequenceDataset) -> None:
    module, data = LightningModule(replay_model("SasRec")), tables(dataset)
    forbid = [Forbid(in_validation=4, in_prediction=9)]
    metrics = ComputeMetricsCallback(["coverage"], [NUM_ITEMS], forbid, NUM_ITEMS)
    top = PandasTopItemsCallback(NUM_ITEMS, "query_id", "item_id", postprocessors=forbid)
    run = trainer(tmp_path, metrics, top)
    (measured,) = run.validate(module, datamodule=data, verbose=False)
    assert measured[f"coverage@{NUM_ITEMS}"] == pytest.approx((NUM_ITEMS - 1) / NUM_ITEMS)
    run.predict(module, datamodule=data, return_predictions=False)
    assert set(top.get_result()["item_id"]) == set(range(NUM_ITEMS)) - {9}


def test_keys_are_checked_and_stay_in_the_batch(dataset: SequenceDataset) -> None:
    module = LightningModule(replay_model("SasRec")).eval()
    items = torch.tensor([[1, 2, 3]])
    batch = {
        "feature_tensors": {"item_id": items},
        "padding_mask": torch.ones_like(items, dtype=torch.bool),
        "ground_truth": torch.tensor([[4]]),
    }
    keys = list(batch)
    assert module(batch)["logits"].shape == (1, NUM_ITEMS) and list(batch) == keys
    batch["pading_mask"] = batch.pop("padding_mask")
    with pytest.raises(UserError, match="SasRec needs padding_mask, and the batch has feature_tensors"):
        module(batch)


def test_a_task_reads_the_batches_of_its_own_data_module(dataset: SequenceDataset) -> None:
    run = chosen(loss_module="CE")
    module = LightningModule(build_task(run, DataModule(dataset.folder, run).catalogue()))
    batch = {"query_id": torch.ones(1)}
    with pytest.raises(UserError, match="a training task reads the batches of DataModule"):
        module(batch)
    with pytest.raises(UserError, match="SequenceRecommender needs item_ids, lengths, and the batch has query"):
        module.eval()(batch)


def test_a_task_exchanges_on_the_device_that_it_is_going_to_be_on(dataset: SequenceDataset) -> None:
    run = chosen(loss_module="CE")
    module = LightningModule(build_task(run, DataModule(dataset.folder, run).catalogue()))
    started = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    module.trainer = started
    module.setup("fit")
    assert module.model.collectives.device == torch.device("cuda", 0)


def test_data_follow_the_settings_of_an_evaluation(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, ragged_sequences(57, NUM_ITEMS, seed=5), item_features=True, unrated=2)
    few = DataModule(data.folder, chosen(eval_users=5, catalogue="all"))
    run, asked = few.settings, []
    for batch in few.val_dataloader():
        asked += batch["query_id"].tolist()
    ranks = ModelEvaluation(run, few.dataset, few.split, Collectives()).validation(build_model(run, few.catalogue()))
    assert len(asked) == 5 and np.flatnonzero(ranks.ranks.numpy()).tolist() == [user - 1 for user in asked]
    assert few.catalogue().num_items == NUM_ITEMS + 2


def test_in_protocol_paper_validation_is_the_test_loader_of_a_subclass(dataset: SequenceDataset) -> None:
    class Own(DataModule):
        def test_dataloader(self) -> str:
            return "own"

    assert Own(dataset.folder, chosen(protocol="paper")).val_dataloader() == "own"


def test_what_comes_next_is_asked_for_at_the_time_of_the_last_event(dataset: SequenceDataset) -> None:
    (batch,) = DataModule(dataset.folder, chosen()).predict_dataloader()
    last = dataset.timestamps[dataset.offsets[1:] - 1]
    assert batch["history"]["next_timestamps"].tolist() == last.tolist()


def test_several_loaders_have_a_suffix(tmp_path: Path, dataset: SequenceDataset) -> None:
    rows = {"query_id": [0, 1], "item_id": [[1, 2, 3], [4]], "ground_truth": [[5], [6]]}
    for number in range(2):
        polars.DataFrame(rows).write_parquet(tmp_path / f"part{number}.parquet")
    metadata = {
        "validation": {
            "query_id": {}, "item_id": {"shape": 2, "padding": PADDING}, "ground_truth": {"shape": 2, "padding": -1},
        }
    }  # fmt: skip
    transforms = make_default_sasrec_transforms(item_schema(NUM_ITEMS))
    paths = [tmp_path / f"part{number}.parquet" for number in range(2)]
    data = ParquetModule(2, metadata, {"validation": transforms["validation"]}, validate_path=paths)
    metrics = ComputeMetricsCallback(["recall"], [NUM_ITEMS])
    module = LightningModule(replay_model("SasRec"))
    results = trainer(tmp_path, metrics).validate(module, datamodule=data, verbose=False)
    names = {name for each in results for name in each}
    assert names == {f"recall@{NUM_ITEMS}/dataloader_idx_{number}" for number in range(2)}
    assert all(value == 1.0 for each in results for value in each.values())


def test_spark_gets_one_row_an_item(tmp_path: Path, dataset: SequenceDataset) -> None:
    class Session:
        """What is asked of a Spark session."""

        def createDataFrame(self, rows, schema):
            return rows, schema

    seen = [SeenItemsFilter(NUM_ITEMS, "train")]
    spark = SparkTopItemsCallback(3, "query_id", "item id", "score", Session(), seen)
    frame = PandasTopItemsCallback(3, "query_id", "item id", "score", seen)
    module = LightningModule(replay_model("SasRec"))
    trainer(tmp_path, spark, frame).predict(module, datamodule=tables(dataset), return_predictions=False)
    rows, schema = spark.get_result()
    assert schema == "`query_id` bigint, `item id` bigint, `score` double"
    assert rows == [*frame.get_result().itertuples(index=False, name=None)]


@pytest.mark.slow
def test_spark_makes_a_frame(tmp_path: Path, dataset: SequenceDataset) -> None:
    sql = pytest.importorskip("pyspark.sql")
    session = sql.SparkSession.builder.master("local[1]").getOrCreate()
    spark = SparkTopItemsCallback(3, "query_id", "item_id", "rating", session)
    module = LightningModule(replay_model("SasRec"))
    trainer(tmp_path, spark).predict(module, datamodule=tables(dataset), return_predictions=False)
    assert spark.get_result().count() == 57 * 3


def test_the_table_of_a_split_is_made_when_it_is_asked_for(
    dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(data: SequenceDataset, split: Any, name: str) -> Any:
        made.append(name)
        return prepared_table(data, split, name)

    monkeypatch.setattr(parquet, "prepared_table", counted)
    data = tables(dataset)
    data.setup("test")
    assert not made
    assert sum(len(batch["query_id"]) for each in data.test_dataloader() for batch in each) == 53
    data.test_dataloader()
    assert made == ["test"]


def test_columns_are_padded_on_the_left(tmp_path: Path) -> None:
    rows = {
        "user": [5, 6], "items": [[1, 2, 3], []], "tags": [[[1], [2, 3]], [[4, 5, 6]]], "price": [[0.5], [1.5, 2.5]],
    }  # fmt: skip
    polars.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    metadata = {
        "train": {
            "user": {}, "items": {"shape": 2, "padding": 9}, "tags": {"shape": [2, 2], "padding": 0},
            "price": {"shape": 3, "padding_value": -1.0},
        }
    }  # fmt: skip
    data = ParquetModule(2, metadata, {}, {"train": {"generator": torch.Generator()}}, train_path=tmp_path)
    (batch,) = list(data.train_dataloader())
    order = batch["user"].argsort()
    batch = {name: values[order] for name, values in batch.items()}
    assert batch["items"].tolist() == [[2, 3], [9, 9]]
    assert batch["items_mask"].tolist() == [[True, True], [False, False]]
    assert batch["tags"].tolist() == [[[0, 1], [2, 3]], [[0, 0], [5, 6]]]
    assert batch["tags_mask"].tolist() == [[[False, True], [True, True]], [[False, False], [True, True]]]
    assert batch["price"].tolist() == [[-1.0, -1.0, 0.5], [-1.0, 1.5, 2.5]]
    assert batch["price"].dtype == torch.float32 and batch["user_mask"].all()


def test_the_number_of_batches_costs_no_draw(tmp_path: Path) -> None:
    polars.DataFrame({"user": range(20)}).write_parquet(tmp_path / "a.parquet")

    def order(asked: int) -> list[int]:
        drawn = {"train": {"generator": torch.Generator().manual_seed(1)}}
        data = ParquetModule(8, {"train": {"user": {}}}, {}, drawn, train_path=tmp_path)
        batches = data.train_dataloader()
        assert [len(batches) for _ in range(asked)] == [3] * asked
        return torch.cat([batch["user"] for batch in batches]).tolist()

    assert order(asked=0) == order(asked=2)


def test_training_rows_are_shuffled_anew_each_epoch(tmp_path: Path, dataset: SequenceDataset) -> None:
    class Seen(lightning.Callback):
        def __init__(self) -> None:
            self.rows: list[list[int]] = []

        def on_train_epoch_start(self, trainer, pl_module) -> None:
            self.rows.append([])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.rows[-1] += batch["query_id"].tolist()

    seen = Seen()
    trainer(tmp_path, seen, max_epochs=2, limit_val_batches=0).fit(
        LightningModule(replay_model("SasRec")), datamodule=tables(dataset)
    )
    first, second = seen.rows
    assert sorted(first) == sorted(second) and first != second and first != sorted(first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"train": {"colour": {}}}}, "no column 'colour'; it has user, items"),
        ({"metadata": {"train": {"user": {"shape": 2}}}}, "it holds int64, and its metadata say shape"),
        ({"metadata": {"train": {"items": {}}}}, "its metadata name no shape"),
        ({"metadata": {"dev": {}}}, "metadata of 'dev': the splits are train"),
        ({"train_path": "nowhere.parquet"}, "there is no Parquet file at nowhere.parquet"),
        ({"train_path": None}, "at least one of the paths"),
        ({"train_path": None, "test_path": "a.parquet"}, "training reads one train_path, and 0 are given"),
        ({"train_path": ["a.parquet", "b.parquet"]}, "training reads one train_path, and 2 are given"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_tables_report_one_line_errors(tmp_path: Path, change: dict, words: str) -> None:
    polars.DataFrame({"user": [1], "items": [[2]]}).write_parquet(tmp_path / "a.parquet")
    arguments = {
        "batch_size": 2, "metadata": {"train": {"user": {}}}, "transforms": {},
        "train_path": tmp_path / "a.parquet", **change,
    }  # fmt: skip
    with pytest.raises(UserError, match=words):
        list(ParquetModule(**arguments).train_dataloader())


def test_bad_callbacks_and_factories_are_refused(tmp_path: Path, dataset: SequenceDataset) -> None:
    with pytest.raises(UserError, match="'auc' is none of"):
        ComputeMetricsCallback(["auc"])
    with pytest.raises(UserError, match="item_count"):
        ComputeMetricsCallback(["coverage"])
    with pytest.raises(UserError, match="ks must be 1 or more, not 0"):
        ComputeMetricsCallback(["recall"], [5, 0])
    with pytest.raises(UserError, match="top_k"):
        TorchTopItemsCallback(0)
    with pytest.raises(UserError, match="predict first"):
        TorchTopItemsCallback(1).get_result()
    with pytest.raises(UserError, match="lion"):
        OptimizerFactory("lion")
    with pytest.raises(UserError, match="is none of adam, adamw, sgd"):
        OptimizerFactory(["adam"])
    with pytest.raises(UserError, match="above 0"):
        LambdaLRSchedulerFactory(1, normal_lr=0.0)
    metrics = ComputeMetricsCallback(["recall"], ground_truth_column="truth")
    with pytest.raises(UserError, match="no column 'truth'; it has"):
        trainer(tmp_path, metrics).validate(
            LightningModule(replay_model("SasRec")), datamodule=tables(dataset), verbose=False
        )


def test_schedules_and_optimizers_follow_their_arguments() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    sgd = OptimizerFactory("sgd", 0.5, 0.1, sgd_momentum=0.9).create([parameter])
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["weight_decay"], sgd.defaults["momentum"]) == (0.5, 0.1, 0.9)
    adam = OptimizerFactory()
    assert adam.create([parameter]).defaults["betas"] == (0.9, 0.98)
    adam.betas = (0.8, 0.9)
    adam.shared["lr"] = 0.5
    changed = adam.create([parameter]).defaults
    assert (adam.optimizer, changed["betas"], changed["lr"]) == ("adam", (0.8, 0.9), 0.5)
    made = LambdaLRSchedulerFactory(2, 1.0, 0.1, "step").create(sgd)
    assert made["interval"] == "step"
    rates = []
    for _ in range(4):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        made["scheduler"].step()
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05])
