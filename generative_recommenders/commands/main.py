"""Flags of ``main.py``: what is asked for, checked and handed to the command that does it.

Commands are imported when they are called: help and lists need no torch.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags, logging

from generative_recommenders.commands.lists import LISTS, show_list
from generative_recommenders.commands.program import Help, start_program
from generative_recommenders.errors import UserError

_GIN_FILES = flags.DEFINE_multi_string(
    "gin_config_file", None, "gin file(s); the embedded example by default"
)
_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "gin bindings, applied over the files")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "predict", "export", "import"],
    "train; score the best checkpoint of --run_dir; write its recommendations, or its model for other programs; or make a "
    "run of --meta_checkpoint there",
)
_META_CHECKPOINT = flags.DEFINE_string(
    "meta_checkpoint", None, "a checkpoint of the HSTU authors' program, for --mode=import"
)
_DATA_ROOT = flags.DEFINE_string("data_root", "data", "where raw/ and prepared/ data sets lie")
_RUN_DIR = flags.DEFINE_string("run_dir", None, "the run's folder; runs/TIME-DATASET-ENCODER by default")
_RESUME = flags.DEFINE_bool(
    "resume", False, "go on with the run in --run_dir from its newest whole checkpoint"
)
_AUTO_RESUME = flags.DEFINE_bool(
    "auto_resume", False, "--resume where --run_dir exists, else start there: for jobs that are started again"
)
_MASTER_PORT = flags.DEFINE_integer(
    "master_port",
    None,
    "TCP port of the rendezvous, a busy one is replaced; 29500, or under SLURM one by the job's number, by default",
    lower_bound=0,
    upper_bound=65535,
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "processes on this host; one a GPU, else one, by default. N of them with local_batch_size b train as one with "
    "N * b: the learning rate is that of this global batch and is not scaled",
    lower_bound=1,
)
_MAX_STEPS = flags.DEFINE_integer("max_steps", None, "stop after so many steps of the run", lower_bound=1)
_PLUGINS = flags.DEFINE_multi_string(
    "plugin", [], "a Python file or module that registers encoders, losses or other parts of your own"
)
_LIST = flags.DEFINE_string(
    "list", None, f"print names, of parts with their options, and stop: {', '.join(LISTS)}"
)
_USERS = flags.DEFINE_string(
    "users",
    "all",
    "predict: all users of the data, or a file of them: ids one a line, or a .csv or .parquet with a column user_id",
)
_HISTORY = flags.DEFINE_enum(
    "history",
    "all",
    ["all", "test"],
    "predict: from all of a user's events, or from those before the test target",
)
_TOP_K = flags.DEFINE_integer("top_k", 10, "predict: items a user", lower_bound=1)
_EXCLUDE_SEEN = flags.DEFINE_bool("exclude_seen", True, "predict: recommend no item of the history")
_CANDIDATES = flags.DEFINE_string(
    "candidates",
    None,
    "predict: a file of the only items that may be recommended: ids one a line, or a .csv or .parquet with a column item_id",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "predict: the file to write, .parquet, .csv or .jsonl, recommendations.parquet by default; export: a folder, RUN/export "
    "by default",
)
_USERS_METRICS = flags.DEFINE_string(
    "users_metrics",
    None,
    "train, evaluate: a file for each user's rank of the test target, .parquet, .csv or .jsonl",
)
_REPORT = flags.DEFINE_bool(
    "report", True, "train: write report.html, numbers and pictures, into the run's folder"
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "evaluate: the folder of another run, to test the difference of the two over their users"
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "torch",
    ["faiss", "onnx", "parquet", "safetensors", "torch"],
    "export: the query encoder as a program of torch or ONNX; or the items as a faiss index, safetensors or Parquet",
)
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "ivf", "hnsw"], "export: kind of the faiss index")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "build everything, say what it is, and stop")
_PROFILE = flags.DEFINE_bool(
    "profile", False, "write a torch profiler trace of a few steps to the run's folder"
)


_OF_A_RUN = (
    (
        _GIN_FILES,
        _BINDINGS,
        _RESUME,
        _AUTO_RESUME,
        _MAX_STEPS,
        _DRY_RUN,
        _PROFILE,
        _META_CHECKPOINT,
        _NUM_PROCESSES,
        _USERS_METRICS,
        _COMPARE,
    ),
    "it takes the run of --run_dir as it is, in one process",
)


def check_flags() -> None:
    """A flag that could not act in the mode is refused."""
    mode = _MODE.value
    idle, why = {
        "train": (
            (_META_CHECKPOINT, _COMPARE),
            "only --mode=import and --mode=evaluate read them",
        ),
        "import": (
            (_RESUME, _AUTO_RESUME, _MAX_STEPS, _DRY_RUN, _PROFILE, _USERS_METRICS, _COMPARE),
            "it makes a run and trains nothing",
        ),
        "predict": _OF_A_RUN,
        "export": _OF_A_RUN,
        "evaluate": (
            (_GIN_FILES, _RESUME, _AUTO_RESUME, _MAX_STEPS, _DRY_RUN, _PROFILE, _META_CHECKPOINT),
            "it rebuilds the run of --run_dir from its checkpoint; --gin_bindings change it",
        ),
    }[mode]
    given = [f"--{flag.name}" for flag in idle if flag.value]
    if given:
        raise UserError(f"{', '.join(given)} cannot go with --mode={mode}: {why}")


def run(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f"unexpected arguments: {' '.join(arguments)}; options are written --name=value")
    if _LIST.value is not None:
        return show_list(_LIST.value, _PLUGINS.value, Path(_DATA_ROOT.value))
    check_flags()
    from generative_recommenders.commands.setup import DEFAULT_CONFIG, Options
    from generative_recommenders.distributed.launch import Worker, launch

    options = Options(
        gin_files=tuple(_GIN_FILES.value or []),
        bindings=tuple(_BINDINGS.value),
        data_root=Path(_DATA_ROOT.value),
        run_dir=_RUN_DIR.value,
        resume=_RESUME.value,
        auto_resume=_AUTO_RESUME.value,
        max_steps=_MAX_STEPS.value,
        profile=_PROFILE.value,
        verbosity=logging.get_verbosity(),
        meta_checkpoint=_META_CHECKPOINT.value,
        default_gin_files=(DEFAULT_CONFIG,),
        plugins=tuple(_PLUGINS.value),
        users_metrics=_USERS_METRICS.value,
        report=_REPORT.value,
        compare=_COMPARE.value,
    )
    mode = _MODE.value
    if mode == "predict":
        from generative_recommenders.commands.predict import PredictOptions, predict

        wanted = PredictOptions(
            _USERS.value,
            _HISTORY.value,
            _TOP_K.value,
            _EXCLUDE_SEEN.value,
            _CANDIDATES.value,
            Path(_OUTPUT.value or "recommendations.parquet"),
        )
        return predict(options, wanted)
    if mode == "export":
        from generative_recommenders.commands.export import ExportOptions, export

        folder = None if _OUTPUT.value is None else Path(_OUTPUT.value)
        return export(options, ExportOptions(_FORMAT.value, folder, _INDEX.value))
    worker: Worker
    if mode == "evaluate":
        from generative_recommenders.commands.evaluate import evaluate_worker as worker
    elif mode == "import":
        from generative_recommenders.commands.import_checkpoint import import_worker as worker
    elif _DRY_RUN.value:
        from generative_recommenders.commands.train import dry_run_worker as worker
    else:
        from generative_recommenders.commands.train import train_worker as worker
    one = mode == "import" or _DRY_RUN.value
    return launch(worker, (options,), 1 if one else _NUM_PROCESSES.value, _MASTER_PORT.value)


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
        ("What is trained", (_GIN_FILES, _BINDINGS, _PLUGINS, _DATA_ROOT, _LIST)),
        ("The run", (_MODE, _RUN_DIR, _RESUME, _AUTO_RESUME, _MAX_STEPS, _DRY_RUN, _PROFILE, _REPORT)),
        ("Processes", (_NUM_PROCESSES, _MASTER_PORT)),
        ("Evaluation", (_USERS_METRICS, _COMPARE)),
        ("Recommendations", (_USERS, _HISTORY, _TOP_K, _EXCLUDE_SEEN, _CANDIDATES, _OUTPUT)),
        ("Export and import", (_FORMAT, _INDEX, _META_CHECKPOINT)),
    ),
)


def start() -> None:
    """Runs the program with the process's arguments."""
    start_program(run, HELP)
