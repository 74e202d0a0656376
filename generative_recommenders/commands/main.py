"""Flags of ``main.py``: what is asked for, checked and handed to the command that does it.

Commands are imported when they are called: help and lists need no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags, logging

from generative_recommenders.commands.lists import LISTS, show_list
from generative_recommenders.commands.program import Help, start_program
from generative_recommenders.config.plugins import PLUGIN_HELP
from generative_recommenders.errors import UserError

flags.DEFINE_multi_string("gin_config_file", None, "gin file(s); the embedded example by default")
flags.DEFINE_multi_string("gin_bindings", [], "gin bindings, applied over the files")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "predict", "export", "import"],
    "train; score the best checkpoint of --run_dir; write its recommendations, or its model for other programs; or "
    "make a run of --meta_checkpoint there",
)
flags.DEFINE_string("meta_checkpoint", None, "a checkpoint of the HSTU authors' program, for --mode=import")
flags.DEFINE_string("data_root", "data", "where raw/ and prepared/ data sets lie")
flags.DEFINE_string("run_dir", None, "the run's folder; runs/TIME-DATASET-ENCODER by default")
flags.DEFINE_bool("resume", False, "resume the run in --run_dir from its newest whole checkpoint")
flags.DEFINE_bool(
    "auto_resume", False, "--resume where --run_dir exists, else start there: for jobs that are started again"
)
flags.DEFINE_integer(
    "master_port",
    None,
    "TCP port of the rendezvous, a busy one is replaced; 29500, or under SLURM one by the job's number, by default",
    lower_bound=0,
    upper_bound=65535,
)
flags.DEFINE_integer(
    "num_processes",
    None,
    "processes on this host; one a GPU, else one, by default. N of them with local_batch_size b train as one with "
    "N * b: the learning rate is that of this global batch and is not scaled",
    lower_bound=1,
)
flags.DEFINE_integer("max_steps", None, "stop after so many steps of the run", lower_bound=1)
flags.DEFINE_multi_string("plugin", [], PLUGIN_HELP)
flags.DEFINE_string("list", None, f"print names, of parts with their options, and stop: {', '.join(LISTS)}")
flags.DEFINE_string(
    "users",
    "all",
    "predict: all users of the data, or a file of them: ids one a line, or a .csv or .parquet with a column user_id",
)
flags.DEFINE_enum(
    "history",
    "all",
    ["all", "test"],
    "predict: from all of a user's events, or from those before the test target",
)
flags.DEFINE_integer("top_k", 10, "predict: items a user", lower_bound=1)
flags.DEFINE_bool("exclude_seen", True, "predict: recommend no item of the history")
flags.DEFINE_string(
    "candidates",
    None,
    "predict: a file of the only items that may be recommended: ids one a line, "
    "or a .csv or .parquet with a column item_id",
)
flags.DEFINE_string(
    "output",
    None,
    "predict: the file to write, .parquet, .csv or .jsonl, recommendations.parquet by default; export: a folder, "
    "RUN/export by default",
)
flags.DEFINE_string(
    "users_metrics",
    None,
    "train, evaluate: a file for each user's rank of the test target, .parquet, .csv or .jsonl",
)
flags.DEFINE_bool("report", True, "train: write report.html, numbers and pictures, into the run's folder")
flags.DEFINE_string(
    "compare", None, "evaluate: the folder of another run, to test the difference of the two over their users"
)
flags.DEFINE_enum(
    "format",
    "torch",
    ["faiss", "onnx", "parquet", "safetensors", "torch"],
    "export: the query encoder as a program of torch or ONNX; or the items as a faiss index, safetensors or Parquet",
)
flags.DEFINE_enum("index", "exact", ["exact", "ivf", "hnsw"], "export: kind of the faiss index")
flags.DEFINE_bool("dry_run", False, "build everything, say what it is, and stop")
flags.DEFINE_bool("profile", False, "write a torch profiler trace of a few steps to the run's folder")


_ANSWERS, _EXPORTS = "users history top_k exclude_seen candidates", "format index"
_OF_A_RUN = (
    "gin_config_file gin_bindings resume auto_resume max_steps dry_run profile meta_checkpoint num_processes "
    "users_metrics compare report"
)
_AS_IT_IS = "it takes the run of --run_dir as it is, in one process"
IDLE = {
    "train": (
        f"meta_checkpoint compare output {_ANSWERS} {_EXPORTS}",
        "--mode=import, evaluate, predict and export read them, see --help",
    ),
    "import": (
        f"resume auto_resume max_steps dry_run profile num_processes users_metrics compare report output {_ANSWERS} "
        f"{_EXPORTS}",
        "it makes a run in one process, and trains nothing",
    ),
    "predict": (f"{_OF_A_RUN} master_port {_EXPORTS}", _AS_IT_IS),
    "export": (f"{_OF_A_RUN} master_port {_ANSWERS}", _AS_IT_IS),
    "evaluate": (
        f"gin_config_file resume auto_resume max_steps dry_run profile meta_checkpoint report output {_ANSWERS} "
        f"{_EXPORTS}",
        "it rebuilds the run of --run_dir from its checkpoint; --gin_bindings change it, "
        "--users_metrics=FILE keeps ranks",
    ),
}
"""By mode, the flags that could not act in it and are refused, and why."""


def _refuse(names: str, why: str, beside: str) -> None:
    """UserError for flags of these names that are given, but could not act ``beside`` another one."""
    given = flags.FLAGS
    changed = [name for name in names.split() if given[name].value != given[name].default]
    if idle := [f"--no{name}" if given[name].value is False else f"--{name}" for name in changed]:
        raise UserError(f"{', '.join(idle)} cannot go with {beside}: {why}")


def run(arguments: list[str]) -> int:
    given = flags.FLAGS
    if arguments:
        raise UserError(f"unexpected arguments: {' '.join(arguments)}; options are written --name=value")
    if given.list is not None:
        return show_list(given.list, given.plugin, Path(given.data_root))
    _refuse(*IDLE[given.mode], f"--mode={given.mode}")
    if given.dry_run:
        idle = "num_processes max_steps profile users_metrics report"
        _refuse(idle, "it trains and scores nothing, in one process", "--dry_run")
    if given.index != "exact" and given.format != "faiss":
        raise UserError(f"--index={given.index} is for --format=faiss, and this is {given.format}")
    from generative_recommenders.commands.setup import Options
    from generative_recommenders.distributed.launch import Worker, launch

    passed_on = "run_dir resume auto_resume max_steps profile meta_checkpoint users_metrics report compare"
    of_same_name: dict[str, Any] = {name: given[name].value for name in passed_on.split()}
    options = Options(
        gin_files=tuple(given.gin_config_file or []),
        bindings=tuple(given.gin_bindings),
        data_root=Path(given.data_root),
        plugins=tuple(given.plugin),
        verbosity=logging.get_verbosity(),
        **of_same_name,
    )
    if given.mode == "predict":
        from generative_recommenders.commands.predict import predict

        asked = given.users, given.history, given.top_k, given.exclude_seen, given.candidates
        return predict(options, *asked, Path(given.output or "recommendations.parquet"))
    if given.mode == "export":
        from generative_recommenders.commands.export import export

        return export(options, given.format, Path(given.output) if given.output else None, given.index)
    worker: Worker
    if given.mode == "evaluate":
        from generative_recommenders.commands.evaluate import evaluate_worker as worker
    elif given.mode == "import":
        from generative_recommenders.commands.import_checkpoint import import_worker as worker
    elif given.dry_run:
        from generative_recommenders.commands.train import dry_run_worker as worker
    else:
        from generative_recommenders.commands.train import train_worker as worker
    one = given.mode == "import" or given.dry_run
    return launch(worker, (options,), 1 if one else given.num_processes, given.master_port)


HELP = Help(
    "main.py",
    "train",
    "Trains a next-item model, scores it, answers for users and exports it.",
    (
        ("", "trains SASRec on the embedded example: a minute on two cores"),
        (
            "--gin_config_file=configs/ml-1m/sasrec-sampled-softmax-n128.gin",
            "another experiment; --list=configs names them",
        ),
        (
            "--gin_bindings='train_fn.num_epochs = 5' --gin_bindings='train_fn.main_module = \"HSTU\"'",
            "changes settings; texts keep their quotes",
        ),
        ("--mode=evaluate --run_dir=runs/my-run", "scores the best checkpoint of a run"),
        (
            "--mode=predict --run_dir=runs/my-run --top_k=10 --output=recs.parquet",
            "recommends for every user of the data",
        ),
        ("--list=encoders", "the encoders with their options"),
    ),
    (
        ("What is trained", "gin_config_file gin_bindings plugin data_root list"),
        ("The run", "mode run_dir resume auto_resume max_steps dry_run profile report"),
        ("Processes", "num_processes master_port"),
        ("Evaluation", "users_metrics compare"),
        ("Recommendations", "users history top_k exclude_seen candidates output"),
        ("Export and import", "format index meta_checkpoint"),
    ),
)


def start() -> None:
    """Runs the program with the process's arguments."""
    start_program(run, HELP)
