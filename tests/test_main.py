"""The real entry point, as a user runs it: train, evaluate, resume, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generative_recommenders.build.parts import Catalogue, build_model
from generative_recommenders.config.gin import load_settings
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings
from generative_recommenders.data.sources.synthetic_oracle import oracle
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.modeling.model import SequenceRecommender
from golden_encoders import named
from programs import ROOT, run_program

SMALL = [
    "train_fn.max_sequence_length = 20",
    "train_fn.item_embedding_dim = 32",
    "train_fn.local_batch_size = 64",
    "sasrec_encoder.ffn_hidden_dim = 32",
    "train_fn.num_negatives = 128",
    "train_fn.learning_rate = 3e-3",
]


def program(script: str, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = run_program(script, *arguments)
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done


def bindings(*extra: str) -> list[str]:
    return [f"--gin_bindings={binding}" for binding in (*SMALL, *extra)]


def prepare(data_root: Path, name: str, **synthetic: object) -> None:
    flags = [f"--{key}={value}" for key, value in synthetic.items()]
    program(
        "preprocess_public_data.py",
        "--dataset=synthetic-books",
        f"--name={name}",
        f"--data_root={data_root}",
        *flags,
    )


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare(root, "synthetic-books", synthetic_users=800, synthetic_items=200, predictability=0.9)
    return root


def final_results(run: Path) -> dict[str, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["results"]


def newest_weights(run: Path) -> dict:
    newest = sorted((run / "checkpoints").glob("0*"))[-1]
    return load_file(newest / "tensors.safetensors")


def test_trains_above_the_baselines_and_below_the_oracle(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = program("main.py", f"--data_root={data_root}", f"--run_dir={run}", *bindings("train_fn.num_epochs = 12"))
    results = final_results(run)
    best = oracle(SyntheticBooksSettings(num_users=800, num_items=200, predictability=0.9))
    assert results["SASRec"]["ndcg@10"] > 3 * results["most popular"]["ndcg@10"]
    assert results["SASRec"]["hr@10"] > 0.35
    assert results["SASRec"]["hr@10"] < best.hit_rate[10] + 3 * best.noise(10, 800)
    for name in ("resolved.gin", "metrics.jsonl", "tensorboard", "checkpoints"):
        assert (run / name).exists()
    for shown in ("most popular", "last item's successor", "hr@10", "ndcg@50", "mrr", "split leave_one_out"):
        assert shown in done.stdout
    assert done.stderr.count("validation hr@10") == 12

    scored = program("main.py", "--mode=evaluate", f"--data_root={data_root}", f"--run_dir={run}")
    row = next(line for line in scored.stdout.splitlines() if line.startswith("SASRec"))
    assert [f"{results['SASRec'][m]:.4f}" for m in ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr")] == row.split()[1:]
    other_data_of_the_same_size_are_refused(tmp_path, run)


def other_data_of_the_same_size_are_refused(tmp_path: Path, run: Path) -> None:
    prepare(tmp_path, "synthetic-books", synthetic_users=800, synthetic_items=200, synthetic_seed=9)
    evaluate = ("main.py", "--mode=evaluate", f"--data_root={tmp_path}", f"--run_dir={run}")
    for binding in ((), ("--gin_bindings=train_fn.protocol = 'paper'",)):
        refused = program(*evaluate, *binding, check=2)
        assert "prepared data changed" in refused.stderr and not refused.stdout


def test_unpredictable_data_stay_under_the_ceiling(tmp_path: Path) -> None:
    prepare(tmp_path, "noise", synthetic_users=1000, synthetic_items=200, predictability=0.0)
    run = tmp_path / "run"
    program(
        "main.py", f"--data_root={tmp_path}", f"--run_dir={run}",
        *bindings("train_fn.dataset_name = 'noise'", "train_fn.num_epochs = 4"),
    )  # fmt: skip
    ceiling = oracle(SyntheticBooksSettings(num_users=1000, num_items=200, predictability=0.0))
    measured = final_results(run)
    for method in ("SASRec", "most popular", "last item's successor"):
        assert measured[method]["hr@10"] < ceiling.hit_rate[10] + 4 * ceiling.noise(10, 900), method


def test_resumed_equals_uninterrupted_bit_for_bit(data_root: Path, tmp_path: Path) -> None:
    common = [f"--data_root={data_root}", *bindings("train_fn.num_epochs = 2", "train_fn.eval_interval = 7")]
    program("main.py", *common, f"--run_dir={tmp_path / 'whole'}")
    program("main.py", *common, f"--run_dir={tmp_path / 'parts'}", "--max_steps=17")
    program("main.py", *common, f"--run_dir={tmp_path / 'parts'}", "--resume")
    whole, parts = newest_weights(tmp_path / "whole"), newest_weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(bool((whole[name] == parts[name]).all()) for name in whole)
    assert final_results(tmp_path / "whole") == final_results(tmp_path / "parts")


def test_a_stopped_run_leaves_a_checkpoint_to_resume_from(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [f"--data_root={data_root}", f"--run_dir={run}", *bindings("train_fn.num_epochs = 400")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0)
    second = program("main.py", *arguments, "--resume", check=2)
    assert "in use" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert "--resume" in errors
    assert newest_weights(run)
    again = program("main.py", *arguments, check=2)
    assert "--resume" in again.stderr


def as_the_authors_save(model: SequenceRecommender, path: Path) -> Path:
    """The weights of SASRec under the names of the HSTU authors' program, in a file as it writes them."""
    state = {f"module.{theirs}": value.detach() for theirs, value in named(model)}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    return path


def test_a_checkpoint_of_the_authors_is_imported_and_scored(data_root: Path, tmp_path: Path) -> None:
    settings = load_settings([ROOT / "configs" / "synthetic-books" / "sasrec.gin"], SMALL)
    dataset = SequenceDataset.open(data_root / "prepared" / "synthetic-books")
    model = build_model(settings, Catalogue.of(dataset, make_split(dataset).train_stops, None))
    file, run = as_the_authors_save(model, tmp_path / "ckpt"), tmp_path / "run"
    common = [f"--data_root={data_root}", f"--run_dir={run}"]
    program("main.py", "--mode=import", f"--meta_checkpoint={file}", *common, *bindings())
    imported = newest_weights(run)
    assert all(torch.equal(imported[f"model.{name}"], value) for name, value in model.named_parameters())
    assert "\nSASRec " in program("main.py", "--mode=evaluate", *common).stdout
    other = ["--mode=import", f"--meta_checkpoint={file}", common[0], f"--run_dir={tmp_path / 'other'}"]
    wrong = program("main.py", *other, *bindings("sasrec_encoder.ffn_hidden_dim = 16"), check=2)
    assert "in the checkpoint and [16" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_verbosity_reaches_the_workers(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quiet = [f"--data_root={data_root}", f"--run_dir={run}", "--max_steps=1", "--verbosity=-1"]
    done = program("main.py", *quiet, *bindings())
    only_results = (run / "train.log").read_text()
    assert only_results.count(" INFO ") == 1 and "most popular" in only_results
    assert " INFO " not in done.stderr


def wait_for(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gin_bindings=train_fn.lerning_rate = 1"], ["lerning_rate", "learning_rate"]),
        (["--gin_bindings=train_fun.learning_rate = 1"], ["train_fun", "train_fn"]),
        (["--gin_bindings=train_fn.learning_rate = 'high'"], ["learning_rate", "float"]),
        (["--gin_bindings=train_fn.main_module = 'LSTM'"], ["LSTM", "SASRec"]),
        (["--gin_bindings=train_fn.protocol = 'mine'"], ["mine", "leave_one_out"]),
        (["--gin_bindings=sasrec_encoder.num_heads = 5"], ["num_heads", "5"]),
        (["--gin_bindings=train_fn.optimizer = 'foo'"], ["optimizer", "foo", "lazy_adamw"]),
        (["--gin_bindings=train_fn.objective = 'foo'"], ["objective", "foo", "causal"]),
        (["--gin_bindings=train_fn.dataset_name = 'nowhere'"], ["nowhere", "preprocess_public_data.py"]),
        (["--gin_config_file=missing.gin"], ["missing.gin"]),
        (["--mode=evaluate"], ["--run_dir"]),
        (
            ["--mode=evaluate", "--run_dir=r", "--gin_config_file=missing.gin"],
            ["--gin_config_file", "--mode"],
        ),
        (["--mode=evaluate", "--run_dir=r", "--dry_run", "--resume"], ["--dry_run", "--resume"]),
        (["--mode=evaluate", "--run_dir=r", "--auto_resume"], ["--auto_resume"]),
        (["--mode=evaluate", "--run_dir=r", "--noreport"], ["--noreport cannot go with --mode=evaluate"]),
        (["--mode=predict", "--run_dir=r", "--noreport"], ["--noreport cannot go with --mode=predict"]),
        (["--noreport"], ["--noreport cannot go with --dry_run"]),
        (["--mode=evaluate", "--run_dir=r", "--output=ranks.csv"], ["--output", "--users_metrics"]),
        (["--mode=predict", "--run_dir=r", "--format=onnx"], ["--format cannot go with --mode=predict"]),
        (["--mode=predict", "--run_dir=r", "--resume", "--master_port=5"], ["--resume, --master_port cannot go with"]),
        (["--mode=export", "--run_dir=r", "--top_k=5"], ["--top_k cannot go with --mode=export"]),
        (["--mode=export", "--run_dir=r", "--resume", "--master_port=5"], ["--resume, --master_port cannot go with"]),
        (["--compare=elsewhere"], ["--compare cannot go with --mode=train: "]),
        (["--mode=export", "--run_dir=r", "--index=hnsw"], ["--index=hnsw is for --format=faiss"]),
        (["--top_k=5", "--output=recs.csv"], ["--output, --top_k", "predict"]),
        (["--meta_checkpoint=none.ckpt"], ["--meta_checkpoint", "--mode=import"]),
        (["--mode=import", "--meta_checkpoint=none.ckpt", "--max_steps=3"], ["--max_steps"]),
        (["--num_processes=0"], ["--num_processes=0"]),
        (["--num_processes=2"], ["--num_processes cannot go with --dry_run"]),
        (
            ["--profile", "--max_steps=3", "--users_metrics=ranks.csv"],
            ["--max_steps, --profile, --users_metrics cannot go with --dry_run: "],
        ),
        (["--mode=import", "--num_processes=2"], ["--num_processes cannot go with --mode=import"]),
        (
            ["--gin_bindings=sasrec_encoder.ffn_dropout_rate = 1.5"],
            ["sasrec_encoder.ffn_dropout_rate", "1.5"],
        ),
        (["--gin_bindings=train_fn.partial_eval_num_iters = 0"], ["partial_eval_num_iters"]),
        (["--mode=import"], ["--meta_checkpoint"]),
        (["--mode=import", "--meta_checkpoint=none.ckpt"], ["none.ckpt"]),
        (["surplus"], ["surplus"]),
        (["--num_processes=abc"], ["--num_processes=abc"]),
        (["--master_port=70000"], ["--master_port=70000", "65535"]),
        (["--master_port=-1"], ["--master_port=-1"]),
        (["--lerning_rate=1"], ["lerning_rate"]),
    ],
)
def test_bad_input_gives_one_clear_line(data_root: Path, arguments: list[str], words: list[str]) -> None:
    dry = [] if any(each.startswith("--mode=") for each in arguments) else ["--dry_run"]
    done = program("main.py", f"--data_root={data_root}", *dry, *arguments, check=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_verbosity_shows_the_code_that_a_fault_came_from(data_root: Path) -> None:
    given = ["--dry_run", f"--data_root={data_root}", "--gin_bindings=train_fn.num_epoch = 3"]
    lines = program("main.py", "--verbosity=1", *given, check=2).stderr.splitlines()
    assert lines[-1].startswith("error: ") and any(line.startswith("Traceback") for line in lines)
    assert not any(line.startswith("Traceback") for line in program("main.py", *given, check=2).stderr.splitlines())


def test_dry_run_says_parts_parameters_and_memory(data_root: Path) -> None:
    done = program("main.py", f"--data_root={data_root}", "--dry_run", *bindings())
    for shown in ("SasrecBlock", "parameters", "MiB", "split leave_one_out"):
        assert shown in done.stdout


def test_dry_run_counts_what_two_parts_share_once(data_root: Path) -> None:
    tied = (
        "train_fn.objective = 'replaced'",
        "train_fn.loss_module = 'CE'",
        "train_fn.tie_discriminator = True",
    )
    done = program("main.py", f"--data_root={data_root}", "--dry_run", *bindings(*tied))
    assert "criterion                   33 parameters" in done.stdout  # the head: 32 weights and a bias


@pytest.mark.parametrize("width", [10**10, 10**16])
def test_a_size_that_no_machine_holds_reports_one_line_error(data_root: Path, width: int) -> None:
    huge = bindings(f"train_fn.item_embedding_dim = {width}")
    done = program("main.py", f"--data_root={data_root}", "--dry_run", *huge, check=2)
    assert done.stderr.splitlines()[-1].startswith("error: train_fn.item_embedding_dim must be at most")
    assert "Traceback" not in done.stderr


def test_memory_that_the_machine_has_not_reports_one_line_error(data_root: Path) -> None:
    positions = bindings("train_fn.max_sequence_length = 1048576", "train_fn.item_embedding_dim = 65536")  # 275 GB
    done = program("main.py", f"--data_root={data_root}", "--dry_run", *positions, check=1)
    assert "error: out of memory" in done.stderr and "Traceback" not in done.stderr


def test_two_processes_give_the_metrics_of_one(data_root: Path, tmp_path: Path) -> None:
    common = [
        f"--data_root={data_root}",
        *bindings("train_fn.num_epochs = 1", "train_fn.dropout_rate = 0.0", "sasrec_encoder.ffn_dropout_rate = 0.0"),
    ]
    program("main.py", *common, f"--run_dir={tmp_path / 'one'}", "--gin_bindings=train_fn.local_batch_size = 64")
    shared = program(
        "main.py", *common, f"--run_dir={tmp_path / 'two'}", "--num_processes=2",
        "--gin_bindings=train_fn.local_batch_size = 32",
    )  # fmt: skip
    assert "FutureWarning" not in shared.stderr
    one, two = final_results(tmp_path / "one"), final_results(tmp_path / "two")
    assert one["most popular"] == two["most popular"]
    assert one["last item's successor"] == two["last item's successor"]
    for name, value in one["SASRec"].items():
        assert two["SASRec"][name] == pytest.approx(value, abs=0.01), name


TOWER = ("train_fn.main_module = 'TwoTower'", "item_tower.features = ('item_id', 'genres')")


@pytest.mark.parametrize(
    "chosen",
    [
        ("train_fn.input_preprocessor = 'LearnablePositionalEmbedding'",),
        ("train_fn.input_preprocessor = 'LearnablePositionalEmbeddingRated'",),
        ("train_fn.input_preprocessor = 'CombinedItemAndRating'",),
        TOWER,
    ],
    ids=["positions", "rated", "rating tokens", "two towers with genres"],
)
def test_two_steps_on_ratings_and_features(data_root: Path, tmp_path: Path, chosen: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    end = ("--max_steps=2", f"--run_dir={run}")
    done = program("main.py", f"--data_root={data_root}", *end, *bindings(*chosen))
    model = "TwoTower" if chosen is TOWER else "SASRec"
    assert 0 < final_results(run)[model]["mrr"] < 1
    assert f"TensorBoard log: {run / 'tensorboard'}" in done.stdout and any((run / "tensorboard").iterdir())
    resolved = (run / "resolved.gin").read_text()
    assert all(binding in resolved for binding in chosen)


def test_a_refused_configuration_does_not_take_the_folder(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = ("main.py", f"--data_root={data_root}", f"--run_dir={run}", "--max_steps=1")
    refused = program(*common, *bindings("train_fn.optimizer = 'foo'"), check=2)
    assert "unknown optimizer 'foo'" in refused.stderr
    program(*common, *bindings("train_fn.main_module = 'HSTU'"))
    assert "main_module = 'HSTU'" in (run / "resolved.gin").read_text()
