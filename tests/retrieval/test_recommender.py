"""Answers of a trained run for users in their own ids, from its folder alone."""

from __future__ import annotations

import datetime
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from generative_recommenders import Recommender
from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.model_evaluation import catalogue_scores
from generative_recommenders.retrieval import item_search
from generative_recommenders.retrieval.selection import largest
from recommender_runs import CHOICES, make_run
from tiny_data import ragged_sequences, tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return tiny_dataset(tmp_path_factory.mktemp("data"), ragged_sequences(57, 30, seed=5), item_features=True)


def histories(dataset: SequenceDataset, targets) -> pd.DataFrame:
    """Everything before each user's target, in original ids."""
    users, items = dataset.original_user_ids().to_pylist(), dataset.original_item_ids().to_pylist()
    rows = []
    for user, stop in enumerate(targets):
        first = int(dataset.offsets[user])
        for event in range(first, first + max(int(stop), 0)):
            rows.append(
                (
                    users[user],
                    items[dataset.items[event] - 1],
                    dataset.ratings[event],
                    dataset.timestamps[event],
                )
            )
    return pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])


@pytest.mark.parametrize("name", CHOICES)
def test_recommend_is_the_evaluators_ranking(tmp_path: Path, dataset: SequenceDataset, name: str) -> None:
    run, model, _ = make_run(tmp_path, dataset, {"next_time": "hidden", **CHOICES[name]})
    targets = make_split(dataset, "leave_one_out").test_targets
    loader = EvaluationLoader(dataset, targets, 7, 512)
    (batch,) = list(loader)
    scores = catalogue_scores(model)(batch).float().clone()
    had = loader.histories(loader.users)
    scores[had.rows, had["item_ids"] - 1] = -torch.inf
    best, columns = largest(scores, 5)
    frame = histories(dataset, targets).sample(frac=1, random_state=1)  # in any order: the times say which
    answer = Recommender.load(run).recommend(frame, k=5)
    users, items = dataset.original_user_ids().to_pylist(), dataset.original_item_ids().to_pylist()
    for row, user in enumerate(loader.users):
        own = answer[answer["user_id"] == users[user]].sort_values("rank")
        real = best[row] > -torch.inf
        assert own["item_id"].tolist() == [items[column] for column in columns[row][real]]
        torch.testing.assert_close(torch.tensor(own["score"].to_numpy()), best[row][real], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def rec(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> Recommender:
    return Recommender.load(make_run(tmp_path_factory.mktemp("sasrec"), dataset, {"main_module": "SASRec"})[0])


def test_histories_in_many_forms(rec: Recommender) -> None:
    mapping = {"new": ["i00003", "i00004"], "u00001": ["i00005"]}
    expected = rec.recommend(mapping, k=3)
    assert expected["user_id"].tolist() == ["new"] * 3 + ["u00001"] * 3
    assert expected["rank"].tolist() == [1, 2, 3] * 2
    assert not set(expected["item_id"].head(3)) & set(mapping["new"])
    frame = pl.DataFrame({"user_id": ["new", "new", "u00001"], "item_id": ["i00003", "i00004", "i00005"]})
    lists = {"new": np.array(mapping["new"]), "u00001": iter(["i00005"])}
    for form in (frame, frame.lazy(), frame.to_arrow(), frame.to_pandas(), frame.to_dicts(), lists):
        pd.testing.assert_frame_equal(rec.recommend(form, k=3), expected)


def test_seen_items_candidates_and_a_large_k(rec: Recommender) -> None:
    history = {"a": ["i00001", "i00002"]}
    assert len(rec.recommend(history, k=1000)) == 28
    assert len(rec.recommend(history, k=1000, exclude_seen=False)) == 30
    few = rec.recommend(history, k=5, candidates=["i00002", "i00007", "i00009", "nothing"])
    assert set(few["item_id"]) == {"i00007", "i00009"}
    by_user = rec.recommend({"a": ["i00001"], "b": ["i00001"]}, candidates={"a": ["i00004"], "b": ["i00005"]})
    assert by_user["item_id"].tolist() == ["i00004", "i00005"]
    scores = rec.score(history, ["i00007", "i00009"]).loc["a"]
    ranked = few.set_index("item_id")["score"]
    assert scores["i00007"] == pytest.approx(ranked["i00007"], abs=1e-5)


def test_unknown_items_and_users(rec: Recommender, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        answer = rec.recommend({"a": ["i00001", "what"], "b": ["who"], "c": []}, k=2)
    assert answer["user_id"].unique().tolist() == ["a"]
    assert "1 users have no item" in caplog.text or "2 users have no item" in caplog.text
    assert "2 events of items" in caplog.text or "3 events of items" in caplog.text
    popular = rec.recommend({"c": [], "a": ["i00001"], "b": ["who"]}, k=2, fallback="popular")
    assert popular["user_id"].unique().tolist() == ["c", "a", "b"]
    counts = pd.Series(rec.counts.tolist(), index=rec.item_ids.to_pylist())
    assert counts[popular[popular["user_id"] == "b"]["item_id"].iloc[0]] == counts.max()


def test_candidates_of_each_user_in_any_form(rec: Recommender, caplog: pytest.LogCaptureFixture) -> None:
    histories = {1: ["i00001"], 2: ["i00001"], 3: ["i00001"]}
    mapping = {"1": ["i00004", "i00001", "what"], 2: ["i00005"]}  # 1 here is "1" there; 3 has none
    rows = [(user, item) for user, items in mapping.items() for item in items]
    table = pd.DataFrame(rows, columns=["user_id", "item_id"]).astype({"user_id": str})
    with caplog.at_level(logging.WARNING, logger="absl"):
        expected = rec.recommend(histories, candidates=mapping)
    assert caplog.text.count("1 candidates are not items") == 1
    assert expected[["user_id", "item_id"]].to_numpy().tolist() == [[1, "i00004"], [2, "i00005"]]
    arrow = pl.from_pandas(table)
    for form in (table, arrow, arrow.lazy(), arrow.to_arrow()):
        pd.testing.assert_frame_equal(rec.recommend(histories, candidates=form), expected)
    for form in (pd.Series, set, tuple, np.array, lambda items: pd.DataFrame({"item_id": items})):
        found = rec.recommend({1: ["i00001"]}, candidates=form(["i00004", "i00007"]))
        assert set(found["item_id"]) == {"i00004", "i00007"}


def test_allowed_takes_any_list_of_candidates(rec: Recommender, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert rec.allowed({"i00004", "i00001", "what"}, warn=False).tolist() == [1, 4]
        assert not caplog.text
        assert rec.allowed(("i00004", "what")).tolist() == [4]
        assert "1 candidates are not items" in caplog.text
    with pytest.raises(UserError, match="candidates must be a list of item ids, got str"):
        rec.allowed("i00004")


def test_candidates_of_users_that_became_floats(rec: Recommender) -> None:
    lists = {7: ["i00004"], 8: ["i00005"]}
    floats = pd.DataFrame({"user_id": [7.0, 8.0], "item_id": ["i00004", "i00005"]})
    histories = {7: ["i00001"], 8: ["i00001"]}
    pd.testing.assert_frame_equal(
        rec.recommend(histories, candidates=floats), rec.recommend(histories, candidates=lists)
    )
    frame = pd.DataFrame({"user_id": [7.0, 8.0], "item_id": ["i00001"] * 2})
    assert rec.recommend(frame, candidates=lists)["item_id"].tolist() == ["i00004", "i00005"]


@pytest.mark.parametrize("name", ["SASRec", "MoL with users"])
def test_answers_are_the_same_a_few_rows_at_a_time(
    tmp_path: Path, dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, CHOICES[name])[0])
    histories = {user: [] if user % 3 == 0 else [f"i{1 + user:05}", "i00009"] for user in range(11)}
    own = {user: [f"i{1 + item:05}" for item in range(user)] for user in range(11)}
    scored = []
    monkeypatch.setattr(rec.model, "score", lambda *args, score=rec.model.score: scored.append(1) or score(*args))
    for candidates in (None, own, own[9]):
        answers = []
        for held in (1 << 25, 60):  # all rows, two of 30 items
            monkeypatch.setattr(item_search, "MAX_SCORES", held)
            scored.clear()
            answers.append(rec.recommend(histories, 4, candidates=candidates, fallback="popular"))
        pd.testing.assert_frame_equal(*answers, rtol=1e-4)
        assert len(scored) > 1 or (name == "SASRec" and candidates is not own)


def test_only_the_lists_of_users_who_ask_are_looked_up(rec: Recommender, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="absl"):
        rec.recommend({"a": ["i00001"]}, candidates={"a": ["i00002", "what"], "b": ["who", "which"]})
    assert "1 candidates are not items" in caplog.text


def test_ids_that_are_numbers(tmp_path: Path, dataset: SequenceDataset, rec: Recommender) -> None:
    numbered = Recommender(rec.settings, rec.model, pa.array([*map(str, range(100, 129)), "last"]))
    expected = numbered.recommend({7: [101, 102], 8: [103]}, k=3)
    assert expected["item_id"].dtype == np.int64
    missing = pd.DataFrame({"user_id": [7, 7, 7, 8], "item_id": [101, None, 102, 103]})  # makes them floats
    pd.testing.assert_frame_equal(numbered.recommend(missing, k=3), expected)
    every = numbered.recommend({7: [101]}, k=10**12)
    assert len(every) == 29 and "last" in every["item_id"].tolist()  # which is no number
    zeros = Recommender(rec.settings, rec.model, pa.array(["007", "7", *map(str, range(100, 128))]))
    assert {"007", "7"} <= set(zeros.recommend({7: [101]}, k=30)["item_id"])  # 7 would be both
    large = Recommender(rec.settings, rec.model, pa.array([str(2**63 + number) for number in range(30)]))
    last = pd.DataFrame({"user_id": [7], "item_id": np.array([2**63 + 3], np.uint64)})
    assert large.recommend(last, k=2)["item_id"].min() >= 2**63 and len(large.recommend(last, k=2)) == 2
    assert numbered.similar_items(101, k=2).equals(numbered.similar_items(pd.Series([101], index=[5]), k=2))


def test_the_time_of_a_request(tmp_path: Path, dataset: SequenceDataset) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "HSTU", "next_time": "given"})[0])
    frame = histories(dataset, make_split(dataset, "leave_one_out").test_targets).head(5)
    expected = rec.recommend(frame, at=86_400)
    for at in (86_400.0, pd.Timestamp("1970-01-02"), np.datetime64("1970-01-02"), np.int64(86_400)):
        pd.testing.assert_frame_equal(rec.recommend(frame, at=at), expected)
    day = rec.recommend(frame, at=datetime.datetime(2023, 5, 31))
    assert not day.equals(expected)
    for at in (1_685_491_200, 1_685_491_200_000, 20230531):  # as the times of histories: milliseconds and dates, too
        pd.testing.assert_frame_equal(rec.recommend(frame, at=at), day)
    for at in ("now", float("nan"), 2**70, 2**53 - 1, pd.NaT):
        with pytest.raises(UserError, match="is not a time"):
            rec.recommend(frame, at=at)


def test_a_session_takes_an_older_event_where_it_belongs(tmp_path: Path, dataset: SequenceDataset) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "HSTU", "next_time": "given"})[0])
    frame = histories(dataset, make_split(dataset, "leave_one_out").test_targets)
    own = frame[frame["user_id"] == "u00000"].head(9).assign(timestamp=range(1000, 1900, 100))
    for late in range(1, 9):
        session = rec.session("u00000", own.drop(index=own.index[late]))
        rec.recommend(session)
        event = own.iloc[late]
        rec.append(session, event["item_id"], rating=float(event["rating"]), timestamp=int(event["timestamp"]))
        rec.append(session, "what", rating=1.0, timestamp=5000)
        pd.testing.assert_frame_equal(rec.recommend(session), rec.recommend(own), rtol=1e-4)


def test_long_histories_are_cut_to_the_window_and_stay_seen(rec: Recommender) -> None:
    items = [f"i{number:05}" for number in range(1, 21)]
    answer = rec.recommend({"long": items}, k=30)
    assert not set(answer["item_id"]) & set(items)
    window = rec.recommend({"long": items[-7:]}, k=30)
    kept = window[~window["item_id"].isin(items)]
    assert kept["item_id"].tolist() == answer["item_id"].tolist()


def test_similar_items_and_embeddings(rec: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    near = rec.similar_items(["i00001"], k=4)
    pd.testing.assert_frame_equal(rec.similar_items("i00001", k=4), near)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "normalize", None)  # the items' lengths are taken once
        pd.testing.assert_frame_equal(rec.similar_items(["i00001"], k=4), near)
    assert near["rank"].tolist() == [1, 2, 3, 4] and "i00001" not in near["similar_id"].tolist()
    table = rec.item_embeddings()
    assert table.index.tolist() == rec.item_ids.to_pylist() and table.shape[1] == 8
    assert rec.embed({"a": ["i00001"]}).shape == (1, 8)


def test_faults_report_one_line_errors(rec: Recommender, tmp_path: Path, dataset: SequenceDataset) -> None:
    folder = make_run(tmp_path / "whole", dataset, {"main_module": "SASRec"})[0]
    for call in (
        lambda: rec.recommend({"a": ["i00001"]}, k=0),
        lambda: rec.recommend(pd.DataFrame({"user": [1]})),
        lambda: rec.score({"a": ["i00001"]}, ["what"]),
        lambda: rec.similar_items(["what"]),
        lambda: rec.similar_items(["i00001"], k=0),
        lambda: rec.similar_items({"i00001": 1}),
        lambda: rec.recommend({"a": ["i00001"]}, k=2.5),
        lambda: rec.recommend({"a": ["i00001"]}, candidates="i00002"),
        lambda: rec.recommend({"a": ["i00001"]}, fallback="random"),
        lambda: rec.recommend({"a": "i00001"}),
        lambda: rec.recommend({"a": 1}),
        lambda: rec.recommend({"a": {"i00001", "i00002"}}),
        lambda: rec.session("a", {"i00001", "i00002"}),
        lambda: rec.recommend({7: ["i00001"], "7": ["i00002"]}),
        lambda: rec.recommend({2**100: ["i00001"]}),
        lambda: rec.recommend({2**130: ["i00001"]}),
        lambda: rec.recommend({"a": [["i00001"]]}),
        lambda: rec.recommend({None: ["i00001"]}),
        lambda: rec.recommend({("a", 1): ["i00001"]}),
        lambda: rec.recommend("i00001"),
        lambda: rec.recommend(7),
        lambda: rec.session("a", {"a": ["i00001"]}),
        lambda: Recommender.load(folder, device="gpu"),
        lambda: Recommender.load(tmp_path),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value)
    timed = Recommender.load(make_run(tmp_path, dataset, {"main_module": "HSTU"})[0])
    with pytest.raises(UserError, match="give a table of user_id, item_id, timestamp, or to append timestamp="):
        timed.recommend({"a": ["i00001"]})


@pytest.mark.parametrize("output", ["pandas", "polars", "torch"])
def test_output_has_the_requested_form(rec: Recommender, output: str) -> None:
    history = {"a": ["i00003", "i00004"]}
    expected = rec.recommend(history, k=3)
    answer = rec.recommend(history, k=3, output=output)
    if output == "torch":
        scores, ids = answer
        assert scores.shape == ids.shape == (1, 3)
        assert [rec.item_ids[i - 1].as_py() for i in ids[0].tolist()] == expected["item_id"].tolist()
    else:
        assert isinstance(answer, pd.DataFrame if output == "pandas" else pl.DataFrame)
        assert [tuple(row) for row in answer.to_numpy()] == [tuple(row) for row in expected.to_numpy()]
    with pytest.raises(UserError, match="output 'arrow' is unknown; known: pandas, polars, spark, torch"):
        rec.recommend(history, output="arrow")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("rating", 100.0, "rating 100.0 of user 'a', item 'i00003' is not a number from 0 to 5"),
        ("rating", float("nan"), "rating None of user 'a'"),
        ("rating", None, "rating None of user 'a'"),
        ("rating", "much", "column 'rating': 'much' is not a number"),
        ("timestamp", "yesterday", "column 'timestamp': 'yesterday' is neither a number nor a date"),
    ],
)
def test_values_that_the_model_cannot_read_are_named(
    tmp_path: Path, dataset: SequenceDataset, column: str, value: object, words: str
) -> None:
    chosen = {"main_module": "HSTU", "input_preprocessor": "CombinedItemAndRating", "next_time": "hidden"}
    rec = Recommender.load(make_run(tmp_path, dataset, chosen)[0])
    event = {"user_id": ["a"], "item_id": ["i00003"], "rating": [3.0], "timestamp": [5000]}
    assert len(rec.recommend(pd.DataFrame(event), k=2)) == 2
    with pytest.raises(UserError, match=re.escape(words)):
        rec.recommend(pd.DataFrame(event | {column: [value]}), k=2)


def test_output_as_a_spark_frame(rec: Recommender) -> None:
    sql = pytest.importorskip("pyspark.sql")
    spark = sql.SparkSession.builder.master("local[1]").getOrCreate()
    answer = rec.recommend(spark.createDataFrame([("a", "i00003")], ["user_id", "item_id"]), k=2, output="spark")
    assert [row["rank"] for row in answer.collect()] == [1, 2]


@pytest.mark.parametrize("given", [False, True], ids=["hidden", "given"])
@pytest.mark.parametrize("name", CHOICES)
def test_a_session_answers_as_its_whole_history(
    tmp_path: Path, dataset: SequenceDataset, name: str, given: bool
) -> None:
    chosen = {**CHOICES[name], "next_time": "given" if given else "hidden"}
    rec = Recommender.load(make_run(tmp_path, dataset, chosen)[0])
    frame = histories(dataset, make_split(dataset, "leave_one_out").test_targets)
    own = frame[frame["user_id"] == "u00000"].head(10)  # three more than the window
    assert len(rec.session("u00000", own)) == len(own)
    session = rec.session("u00000", own.head(2))
    for number in range(2, len(own) + 1):
        if number > 2:
            event = own.iloc[number - 1]
            columns = {"rating": float(event["rating"]), "timestamp": int(event["timestamp"])}
            assert rec.append(session, event["item_id"], **columns) is session
        for at in (None, 10**6) if given else (None,):
            whole = rec.recommend(own.head(number), k=5, at=at)
            answer = rec.recommend(session, k=5, at=at)
            assert answer["item_id"].tolist() == whole["item_id"].tolist(), (number, at)
            torch.testing.assert_close(
                torch.tensor(answer["score"].to_numpy()),
                torch.tensor(whole["score"].to_numpy()),
                atol=1e-5,
                rtol=1e-4,
            )


def test_a_session_that_begins_empty_or_with_unknown_items(rec: Recommender) -> None:
    session = rec.session("someone")
    assert rec.recommend(session).empty
    assert len(rec.recommend(session, k=2, fallback="popular")) == 2
    rec.append(session, "what")
    assert rec.recommend(session).empty
    rec.append(session, "i00003")
    pd.testing.assert_frame_equal(rec.recommend(session), rec.recommend({"someone": ["what", "i00003"]}))


def test_new_items_are_known_by_their_features(
    tmp_path: Path, dataset: SequenceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    tower = {"main_module": "TwoTower", "item_tower.features": ("genres", "year")}
    rec = Recommender.load(make_run(tmp_path, dataset, tower)[0])
    before = rec.item_embeddings()
    features = dataset.item_features().to_pandas().set_index(dataset.original_item_ids().to_pandas())
    frame = pd.DataFrame(
        {"item_id": ["n1", "n2"], "genres": [list(features.loc["i00007", "genres"]), ["new", "odd"]],
         "year": [features.loc["i00007", "year"], None]}
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="absl"):
        rec.add_items(frame)
    assert "1 values of genres were not in training and add nothing" in caplog.text
    after = rec.item_embeddings()
    pd.testing.assert_frame_equal(after.head(len(before)), before)
    assert after.index[-2:].tolist() == ["n1", "n2"]
    torch.testing.assert_close(torch.tensor(after.loc["n1"].to_numpy()), torch.tensor(before.loc["i00007"].to_numpy()))
    assert len(rec.recommend({"a": ["i00001"]}, k=100)) == 31
    alone = rec.recommend({"a": ["i00001"]}, k=100, candidates=["n1", "i00002"])
    assert set(alone["item_id"]) == {"n1", "i00002"}
    read = rec.recommend({"a": ["i00001", "n1"]}, k=100)
    expected = rec.recommend({"a": ["i00001"]}, k=100)
    assert read["item_id"].tolist() == [item for item in expected["item_id"] if item != "n1"]
    with caplog.at_level(logging.WARNING, logger="absl"):
        unread = rec.recommend({"a": ["n1"], "b": ["i00001"]}, k=100)
    assert unread["user_id"].unique().tolist() == ["b"]
    assert "1 users have no item that the model can read" in caplog.text
    popular = rec.recommend({"a": ["n1"], "b": ["i00001"]}, k=100, fallback="popular")
    pd.testing.assert_frame_equal(popular[popular["user_id"] == "b"].reset_index(drop=True), unread)
    assert set(popular[popular["user_id"] == "a"]["item_id"]) == set(after.index) - {"n1"}
    rec.save(tmp_path / "grown")
    again = Recommender.load(tmp_path / "grown")
    pd.testing.assert_frame_equal(again.item_embeddings(), after)
    pd.testing.assert_frame_equal(again.recommend({"a": ["i00001", "n1"]}, k=100), read)
    again.add_items(frame.assign(item_id=["n3", "n4"]))
    assert len(again.recommend({"a": ["i00001", "n1"]}, k=100)) == 32
    genre = features.loc["i00007", "genres"][0]  # alone it is a list of one
    again.add_items(pd.DataFrame({"item_id": ["t"], "genres": [genre], "year": [None]}))
    again.add_items(pd.DataFrame({"item_id": ["l"], "genres": [[genre]], "year": [None]}))
    grown = again.item_embeddings()
    assert np.array_equal(grown.loc["t"], grown.loc["l"])
    again.add_items(pd.DataFrame({"item_id": [7.0], "genres": [[genre]], "year": ["1999"]}))
    assert again.item_embeddings().index[-1] == "7"
    genres_of_training = again.facts["item_encodings"]["genres"]
    genres_of_training["categories"] = [str(each) for each in range(len(genres_of_training["categories"]))]
    again.add_items(pd.DataFrame({"item_id": ["text", "none"], "genres": ["1", None], "year": [None, None]}))
    again.add_items(pd.DataFrame({"item_id": ["float", "nan"], "genres": [1, None], "year": [None, None]}))
    grown = again.item_embeddings()
    assert np.array_equal(grown.loc["text"], grown.loc["float"])
    assert np.array_equal(grown.loc["none"], grown.loc["nan"])
    for faulty, words in (
        (frame.assign(item_id=["x", "y"], year=["MCM", None]), "year.*'MCM' is not a number"),
        (frame, "known already"), (frame[["item_id"]].assign(item_id=["x", "y"]), "reads genres"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            again.add_items(faulty)


def test_checkpoints_of_a_training_run_are_not_replaced(tmp_path: Path, rec: Recommender) -> None:
    rec.save(tmp_path / "saved")
    rec.save(tmp_path / "saved")
    (tmp_path / "trained" / "checkpoints" / "000001-epoch-2-step-30").mkdir(parents=True)
    with pytest.raises(UserError, match="save to another folder"):
        rec.save(tmp_path / "trained")


def test_new_items_are_refused_where_the_model_knows_ids(rec: Recommender) -> None:
    with pytest.raises(UserError, match="without 'item_id'"):
        rec.add_items(pd.DataFrame({"item_id": ["n1"]}))


def test_scores_of_bf16_are_rounded_as_the_evaluation_has_them(tmp_path: Path, dataset: SequenceDataset) -> None:
    rec = Recommender.load(make_run(tmp_path, dataset, {"main_module": "SASRec", "main_module_bf16": True})[0])
    some = [f"i{number:05}" for number in range(1, 21)]
    for candidates in (None, some, {"a": some}):
        answer = rec.recommend({"a": ["i00001"]}, k=30, candidates=candidates)
        scores = torch.tensor(answer["score"].to_numpy())
        assert torch.equal(scores, scores.bfloat16().float())
        ranked = answer.sort_values(["score", "item_id"], ascending=[False, True])
        assert answer["item_id"].tolist() == ranked["item_id"].tolist()


def test_a_run_without_counts_stays_one_when_it_is_saved(tmp_path: Path, rec: Recommender) -> None:
    Recommender(rec.settings, rec.model, rec.item_ids, facts=rec.facts).save(tmp_path / "run")
    with pytest.raises(UserError, match="have no counts of items"):
        Recommender.load(tmp_path / "run").recommend({"a": []}, fallback="popular")
