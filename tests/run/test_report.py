"""Reports of runs: one page each, from the run's folder alone, and comparisons over the same users."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from absl import logging

from generative_recommenders.commands import train
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.evaluation.metrics import RankHistogram
from generative_recommenders.report import main as report
from generative_recommenders.run.report import breakdown, pictures
from generative_recommenders.run.report.answers import AttentionMap, layer_weights
from generative_recommenders.run.report.facts import read_facts, write_facts
from generative_recommenders.run.report.page import _names, write_report
from generative_recommenders.run.report.records import conditions, read_records, read_run
from generative_recommenders.run.summary import COLUMNS
from programs import run_program
from recommender_runs import CHOICES, make_run
from report_runs import HOSTILE, ranks_of, titled_dataset
from tiny_data import dataset_of, ragged_sequences, tiny_dataset

SETTINGS = (
    "train_fn.dataset_name = 'tiny'", "train_fn.max_sequence_length = 12", "train_fn.item_embedding_dim = 16",
    "train_fn.local_batch_size = 16", "train_fn.num_negatives = 8", "train_fn.num_epochs = 2",
    "train_fn.eval_interval = 2",
)  # fmt: skip
SHOWN = (
    "Result on the test targets", "95 % bootstrap interval", "most popular", "Where the time went",
    "Protocol leave_one_out", "layer 2, head 2", "Recommendations for 5 users", "Title of 7", "PCA", "split hash",
    "hstu_encoder.num_heads", "training events of the target", "events before the target", "in the order of the file",
)  # fmt: skip
RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


def trained(root: Path, name: str, *bindings: str) -> Path:
    flags = [f"--gin_bindings={each}" for each in (*SETTINGS, *bindings)]
    done = run_program("main.py", "--report", f"--data_root={root}", f"--run_dir={root / name}", *flags)
    assert done.returncode == 0, done.stderr
    assert f"report: {root / name / 'report.html'}" in done.stderr
    assert (root / name / "curves.png").exists()
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and two runs on them."""
    folder = tmp_path_factory.mktemp("report")
    titled_dataset(folder / "prepared" / "tiny")
    trained(folder, "one")
    trained(folder, "two", "train_fn.main_module = 'HSTU'", "hstu_encoder.num_heads = 2")
    return folder


class Page(HTMLParser):
    """What a page refers to, its visible text, and whether its elements are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.scripts = 0
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_writes_one_page_without_the_network(root: Path) -> None:
    text = (root / "two" / "report.html").read_text()
    page = Page(text)
    assert all(each.startswith(("#", "data:image/png;base64,")) for each in page.references)
    assert not re.search(r"url\((?!#)|@import", text) and page.scripts == 0
    assert page.text.count(HOSTILE) >= 1 and "<script>alert" not in text
    for shown in SHOWN:
        assert shown in page.text, shown


def test_the_kept_ranks_give_the_numbers_of_the_final_record(root: Path) -> None:
    final = json.loads((root / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    facts = read_run(root / "one").facts
    kept = json.loads((root / "one" / "report" / "facts.json").read_text())["checkpoint"]
    assert kept == read_run(root / "one").checkpoint.path.name
    assert facts is not None and facts.methods == ["SASRec", "most popular", "last item's successor"]
    for method, metrics in breakdown.results(facts).items():
        for name, interval in metrics.items():
            assert interval.mean == pytest.approx(final["results"][method][name], abs=1e-12)
            assert interval.low <= interval.mean <= interval.high
    assert final["spent"].keys() >= {"evaluation", "test", "baselines"} and final["environment"]["processes"] == "1"


def test_the_folder_alone_suffices(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(root / "one", tmp_path / "elsewhere")
    (run / "report.html").unlink()
    page = tmp_path / "page.html"
    logging.set_verbosity(logging.INFO)
    try:
        assert report([str(run), f"--output={page}"]) == 0
    finally:
        logging.set_verbosity(logging.WARNING)
    assert capsys.readouterr() == (f"{page}\n", "") and not (run / "report.html").exists()
    assert "Recommendations for 5 users" in page.read_text()


def test_runs_are_compared_over_the_same_users_by_id(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "both.html"
    assert report([str(root / "one"), str(root / "two"), f"--output={output}"]) == 0
    page = Page(output.read_text())
    assert "one − two" in page.text and "hstu_encoder.num_heads" not in page.text.partition("Settings that differ")[0]
    assert "train_fn.main_module" in page.text
    shuffled = shutil.copytree(root / "two", tmp_path / "two")
    users = pl.read_parquet(shuffled / "report" / "users.parquet")
    users.sample(fraction=1, shuffle=True, seed=1).write_parquet(shuffled / "report" / "users.parquet")
    assert report([str(root / "one"), str(shuffled), f"--output={tmp_path / 'again.html'}"]) == 0
    tables = [
        re.findall(r"<table>.*?</table>", path.read_text(), re.S)[:2] for path in (output, tmp_path / "again.html")
    ]
    assert tables[0] == tables[1]


def test_the_tests_are_those_of_the_users_metrics(root: Path) -> None:
    facts = {name: read_run(root / name).facts for name in ("one", "two")}
    joint = breakdown.of_common_users(facts)  # type: ignore[arg-type]
    ranks = {name: joint.ranks(name) for name in joint.methods}
    found = breakdown.compared(ranks, joint.num_items, ("ndcg@10", "mrr"))
    assert [(each.first, each.second, each.metric) for each in found] == [
        ("one", "two", "ndcg@10"),
        ("one", "two", "mrr"),
    ]
    for each in found:
        means = [breakdown.user_values(ranks[name], each.metric, joint.num_items).mean() for name in ranks]
        assert each.difference.mean == pytest.approx(means[0] - means[1])
        assert each.difference.low <= each.difference.mean <= each.difference.high and 0 < each.p <= 1


def test_runs_on_other_data_are_refused_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(root / "two", tmp_path / "other")
    path = other / "report" / "facts.json"
    facts = json.loads(path.read_text())
    facts["data"]["split"]["hash"] = "0" * 32
    path.write_text(json.dumps(facts))
    assert report([str(root / "one"), str(other)]) == 2
    error = capsys.readouterr().err
    assert f"{other} has split hash 000" in error and "do not compare" in error and error.count("\n") == 1
    assert report([str(tmp_path / "none")]) == 2
    assert "is no folder of a run" in capsys.readouterr().err


def test_unrated_items_of_the_catalogue_are_candidates_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = tiny_dataset(tmp_path, ragged_sequences(20, 12, seed=5), item_features=True, unrated=3)
    runs = []
    for catalogue in ("rated", "all"):
        dataset = rated.with_catalogue(catalogue)  # type: ignore[arg-type]
        run, _, _ = make_run(tmp_path / catalogue, dataset, {"catalogue": catalogue})
        users, targets, ranks = ranks_of(dataset)
        ranks[:] = dataset.num_items  # the last place
        write_facts(run, dataset, make_split(dataset, "leave_one_out"), {"model": (users, targets, ranks)})
        runs.append(run)
        hits = breakdown.results(read_run(run).facts)["model"]["hr@50"]  # type: ignore[arg-type]
        assert hits.mean == 1.0
        assert "a miss" not in Page(write_report(run).read_text()).text
    assert report([*map(str, runs), f"--output={tmp_path / 'both.html'}"]) == 2
    error = capsys.readouterr().err
    assert f"{runs[1]} has catalogue size 15, {runs[0]} 12: their numbers do not compare" in error


def test_a_single_category_of_each_item_is_its_genre_and_a_list_is_no_title(tmp_path: Path) -> None:
    items = [f"i{number}" for number in range(4)]
    features = pa.table(
        {"item": items, "category": ["odd", "even", None, "even"], "name": [["a", "b"], ["c"], [], ["b"]]}
    )
    columns = {"user": ["u", "v"] * 4, "item": items * 2, "timestamp": [*range(8)]}
    dataset = dataset_of(columns, tmp_path / "tiny", item_features=features)
    split = make_split(dataset, "leave_one_out")
    write_facts(tmp_path / "run", dataset, split, {"model": ranks_of(dataset)})
    facts = read_facts(tmp_path / "run", "rated", "1")
    assert facts is not None
    assert facts.items["genres"].to_list() == [["odd"], ["even"], [], ["even"]]
    assert facts.items["title"].to_list() == [None] * 4


def test_what_is_of_another_checkpoint_or_other_settings_is_no_result_of_a_run(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(20, 12, seed=5))
    run, _, _ = make_run(tmp_path, dataset, {})
    name = read_run(run).checkpoint.path.name
    split, ranks = make_split(dataset, "leave_one_out"), {"model": ranks_of(dataset)}
    for checkpoint, known in ((name, True), (None, True), (f"{name}0", False)):  # None: of earlier releases
        write_facts(run, dataset, split, ranks, checkpoint)
        assert (read_run(run).facts is not None) == known
    for checkpoint, bindings, known in ((name, [], True), (name, ["a.b = 1"], False), (f"{name}0", [], False)):
        record = {"checkpoint": checkpoint, "bindings": bindings, "results": {"SASRec": {}}}
        (run / "evaluation.json").write_text(json.dumps(record))
        assert bool(read_run(run).final) == known


def test_a_page_that_cannot_be_written_costs_no_pictures(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(pictures, "curves")
    monkeypatch.delattr(pictures, "compared_curves")
    (tmp_path / "file").touch()
    for runs in (["one"], ["one", "two"]):
        assert report([*(str(root / run) for run in runs), f"--output={tmp_path / 'file' / 'page.html'}"]) == 2
        assert "is not a folder" in capsys.readouterr().err


def test_runs_of_one_name_are_numbered() -> None:
    given = [SimpleNamespace(name=name) for name in ("a", "a (2)", "a", "a", "b")]
    assert _names(given) == ["a", "a (2)", "a (3)", "a (4)", "b"]  # type: ignore[arg-type]


def test_damaged_facts_report_one_line_error(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(root / "one", tmp_path / "run")
    (run / "report" / "users.parquet").write_bytes(b"PAR1")
    assert report([str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (run / "report" / "facts.json").write_text("[]")
    assert report([str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "x"}, {"seconds": None}, {"spent": None}, {"spent": {"test": "x"}}, {"environment": 3},
        {"peak_rss_mb": [1]}, {"results": None}, {"results": {"HSTU": 3}}, {"conditions": 3}, {"list_metrics": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_final_record_that_was_edited_by_hand_is_passed_over(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, object]
) -> None:
    records = read_records(root / "one" / "metrics.jsonl")
    run = shutil.copytree(root / "one", tmp_path / "run")
    edited = [*records[:-1], {**records[-1], **changed}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in edited))
    assert read_run(run).final == {} and records[-1]["part"] == "final"
    assert f"record {len(records)} is not as a run writes it" in caplog.text


def test_a_page_is_made_without_the_records_that_are_damaged(root: Path, tmp_path: Path) -> None:
    run = shutil.copytree(root / "one", tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    edited = [{**record, "seconds": "x"} for record in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in edited))
    assert report([str(run)]) == 0


def test_a_fault_of_the_report_costs_no_run(
    ragged_dataset: SequenceDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a picture\nof many lines")

    monkeypatch.setattr("generative_recommenders.run.report.page.write_report", fail)
    split = make_split(ragged_dataset, "leave_one_out")
    train.write_page(tmp_path, ragged_dataset, split, {"model": ranks_of(ragged_dataset)}, None)
    assert [record.getMessage() for record in caplog.records] == [
        f"the report of {tmp_path} cannot be written: RuntimeError: a picture"
    ]


def test_an_old_run_has_a_page_and_evaluation_adds_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RELEASE / "prepared", tmp_path / "data" / "prepared")
    run = shutil.copytree(RELEASE / "runs" / "sasrec", tmp_path / "run")
    assert report([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert f"--mode=evaluate --run_dir={run}" in Page((run / "report.html").read_text()).text
    assert report([str(run), str(run)]) == 2
    assert "keeps no ranks of its users" in capsys.readouterr().err
    done = run_program("main.py", "--mode=evaluate", f"--run_dir={run}", f"--data_root={tmp_path / 'data'}")
    assert done.returncode == 0, done.stderr
    assert report([str(run)]) == 0
    assert "Recommendations for 5 users" in (run / "report.html").read_text()


ALIKE = ("HSTU", "LiGR", "TwoTower", "permuted", "event features")
"""Kinds whose pages are made as those of the others."""


@pytest.mark.parametrize(
    ("kind", "maps"),
    [("FuXi", 4), ("DiffTransformer", 8), ("MoL with users", 4), ("masked", 4), ("ratings", 4),
     *(pytest.param(kind, 4, marks=pytest.mark.slow) for kind in ALIKE)],
)  # fmt: skip
def test_models_of_every_kind_have_a_page(tmp_path: Path, kind: str, maps: int) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(57, 30, seed=5), item_features=True)
    run, _, _ = make_run(tmp_path, dataset, CHOICES[kind])
    write_facts(
        run,
        dataset,
        make_split(dataset, "leave_one_out"),
        {"model": ranks_of(dataset), "other": ranks_of(dataset, 1)},
    )
    page = Page(write_report(run).read_text())
    channels = sum(
        page.text.count(f"layer {layer}, by {what}, all heads") for layer in (1, 2) for what in ("place", "time")
    )
    assert channels == (4 if kind == "FuXi" else 0)
    assert page.text.count("layer 1, head") == maps // 2 and page.text.count("layer 2, head") == maps // 2
    assert "Recommendations for 5 users" in page.text and "two dimensions" in page.text
    assert ("[mask]" in page.text) == (kind in ("masked", "permuted"))
    assert ("(rating)" in page.text) == (kind == "ratings")


@pytest.mark.parametrize(
    ("seen_filter", "candidates"),
    [
        ("none", "whole catalogue. "),
        ("window", "whole catalogue but the seen items (seen filter 'window'). "),
    ],
)
def test_conditions_say_which_items_are_candidates(tmp_path: Path, seen_filter: str, candidates: str) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(20, 12, seed=5))
    run, _, _ = make_run(tmp_path, dataset, {"seen_filter": seen_filter})
    assert any(f"Each target is ranked among the {candidates}" in line for line in conditions(read_run(run)))


@pytest.mark.parametrize("kind", ["SASRec", "HSTU", "Transformer"])
def test_attention_is_causal_and_that_of_the_model(tmp_path: Path, kind: str) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(57, 30, seed=5))
    _, model, _ = make_run(tmp_path, dataset, CHOICES[kind])
    ids, times = torch.tensor([[3, 5, 2, 9, 1, 4, 0]]), torch.tensor([[1, 20, 300, 4000, 50000, 600000, 0]])
    batch = {
        "item_ids": ids,
        "lengths": torch.tensor([6]),
        "timestamps": times,
        "next_timestamps": torch.tensor([7_000_000]),
    }
    layers = layer_weights(model, batch)  # type: ignore[arg-type]
    assert [layer for layer, _ in layers] == [0, 1]
    for _, (weights, _) in layers:
        assert weights.shape == (2, 6, 6) and bool((weights.triu(1) == 0).all())
        if kind != "HSTU":
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))


def test_metrics_of_users_are_those_of_the_histogram() -> None:
    """Also where a cutoff is beyond the catalogue, in which a miss is no hit."""
    for num_items in (7, 400):
        ranks = torch.randint(1, num_items + 2, (500,), generator=torch.Generator().manual_seed(1))
        histogram = RankHistogram(num_items)
        histogram.add(ranks)
        expected = histogram.compute()
        for name in COLUMNS:
            found = breakdown.user_values(ranks.numpy(), name, num_items).mean()
            assert found == pytest.approx(expected[name]), (num_items, name)


def test_groups_hold_every_target_once_and_genres_each_of_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_run(root / "one").facts
    assert facts is not None
    for column in ("history_length", "item_events"):
        found = breakdown.by_size(facts, column, "hr@10")
        assert 2 <= len(found) <= breakdown.GROUPS and sum(each.targets for each in found) == len(facts.users)
        total = sum(each.values["SASRec"].mean * each.targets for each in found) / len(facts.users)
        assert total == pytest.approx(breakdown.results(facts)["SASRec"]["hr@10"].mean)
    monkeypatch.setattr(breakdown, "FEWEST_TARGETS", 12)
    genres = {each.label: each.targets for each in breakdown.by_genre(facts, "hr@10")}
    of_targets = facts.users.join(facts.items, on="item_id")["genres"].explode()
    counts = dict(of_targets.value_counts().iter_rows())
    assert genres == {name: count for name, count in counts.items() if count >= 12} and len(genres) >= 2


def test_titles_are_drawn_as_they_are() -> None:
    svg = pictures.attention(AttentionMap("layer 1, head 1", np.eye(2), ["$\\frac{ 5 and $6", "<b>&\x07\n日本"]))
    assert "$\\frac{ 5 and $6" in svg and "&lt;b&gt;&amp; 日本" in svg
    assert "currentColor" in svg and "#010203" not in svg


def test_a_picture_without_numbers_is_none() -> None:
    assert pictures.curves([], "validation", None, "run") is None
    assert pictures.steps([{"step": 1, "train/loss": float("nan")}]) is None
    assert pictures.compared_curves({"a": [{"epoch": 1}]}, "mrr") is None
