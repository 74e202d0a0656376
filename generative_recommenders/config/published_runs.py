"""Published configurations: how a run differs from the one that the authors of HSTU, MoL or FuXi published."""

from __future__ import annotations

from generative_recommenders.config.schema import NAMES, RunSettings

DATA_SETS = ("ml-1m", "ml-20m", "ml-3b", "amzn-books")
CHOICES = {"protocol": "paper", "seen_filter": "window", "next_time": "given", "catalogue": "all"}
"""``train_fn`` settings of ours that a published run has other values of than our defaults;
``configs/runs/published.gin``."""
SETTINGS = frozenset(
    {
        "dataset_name", "max_sequence_length", "positional_sampling_ratio", "local_batch_size", "eval_batch_size",
        "eval_user_max_batch_size", "main_module", "main_module_bf16", "eval_bf16", "dropout_rate",
        "user_embedding_norm", "sampling_strategy", "loss_module", "loss_weights", "num_negatives",
        "loss_activation_checkpoint", "item_l2_norm", "temperature", "num_epochs", "learning_rate", "num_warmup_steps",
        "weight_decay", "top_k_method", "eval_interval", "full_eval_every_n", "save_ckpt_every_n",
        "partial_eval_num_iters", "embedding_module_type", "item_embedding_dim", "interaction_module_type",
        "gr_output_length", "l2_norm_eps", "enable_tf32", "random_seed",
    }
)  # fmt: skip
"""``train_fn`` settings of the published programs."""
FREE = frozenset({"keep_checkpoints", "checkpoint_minutes", "deterministic", "list_metrics_k", "rating_threshold"})
"""``train_fn`` settings of ours that change no published number."""
OWN_OPTIONS = frozenset(
    {
        "attn_divisor", "enable_relative_time_bias", "enable_relative_position_bias", "norm_weights", "final_norm",
        "query_use_identity_fn", "item_use_identity_fn", "item_dropout_shared",
    }
)  # fmt: skip
PARTS = {"sasrec_encoder", "hstu_encoder", "fuxi_encoder", "create_mol_interaction_module"}


def is_published(settings: RunSettings) -> bool:
    """Whether every setting is one of the published programs', on one of their data sets."""
    default, kinds = RunSettings(), settings.model
    # A setting of ours at its default is as good as absent, so that new settings need no entry here.
    known = SETTINGS | FREE | CHOICES.keys()
    own = [n for n in NAMES if n.startswith("train_fn.") and n.removeprefix("train_fn.") not in known]
    options = {option for owner, given in settings.options.items() if owner in PARTS for option in given}
    return (
        settings.data.dataset_name in DATA_SETS
        and all(settings.value(name) == default.value(name) for name in own)
        and not options & OWN_OPTIONS
        and kinds.main_module in ("SASRec", "HSTU", "FuXi")
        and kinds.interaction_module_type in ("", "DotProduct", "MoL")
        and settings.loss.loss_module in ("SampledSoftmaxLoss", "BCELoss")
        and settings.negatives.sampling_strategy in ("local", "in-batch")
    )


def differences(settings: RunSettings, tie_order: str | None, has_unrated: bool) -> str | None:
    """The line that ends a run of a published configuration whose choices are not the published run's; None where there
    is nothing to say.

    tie_order: ``--tie_order`` of the preparation, None without ties. has_unrated: whether there are items without
    ratings.
    """
    if not is_published(settings):
        return None
    found = [
        f"{name} {settings.value(f'train_fn.{name}')!r} (published: {wanted!r})"
        for name, wanted in CHOICES.items()
        if settings.value(f"train_fn.{name}") != wanted
        and (name != "next_time" or settings.encoder_name in ("HSTU", "FuXi"))
        and (name != "catalogue" or has_unrated)
    ]
    ways = ["configs/runs/published.gin makes the same choices"] if found else []
    if tie_order not in (None, "published"):
        found.append(f"--tie_order={tie_order} of the preparation")
        ways.append("prepare with --tie_order=published")
    if not found:
        return None
    return (
        f"not the published run of this configuration: {', '.join(found)}; the numbers do not compare with the "
        f"published ones ({'; '.join(ways)})"
    )


def unlike_published(settings: RunSettings) -> list[str]:
    """One line for each setting that acts here otherwise than in the published programs."""
    ratio, lines = settings.data.positional_sampling_ratio, []
    # On ML-1M they sample anew each epoch too: the workers of a loader, which keep what they drew, live for an epoch.
    if ratio < 1 and settings.data.dataset_name != "ml-1m":
        lines.append(
            f"train_fn.positional_sampling_ratio = {ratio}: histories are sampled anew each epoch; the published "
            "programs sampled those of ml-1m alone and ignored this elsewhere"
        )
    if settings.model.main_module_bf16:
        lines.append(
            "train_fn.main_module_bf16: embeddings, products and scores are in bfloat16, weights and their updates in "
            "float32; the published programs kept these in bfloat16 too"
        )
    if settings.evaluation.eval_bf16:
        lines.append(
            "train_fn.eval_bf16: the encoder's products are in bfloat16 in evaluation, the scores in float32; the "
            "published programs rounded the states and items that they scored instead"
        )
    if settings.encoder_name == "HSTU" and settings.value("hstu_encoder.attn_dropout_rate"):
        lines.append(
            "hstu_encoder.attn_dropout_rate: weights of the attention are dropped; the published programs read it and "
            "drop none"
        )
    if settings.data.protocol == "paper":
        lines.append(
            "train_fn.eval_interval: a batch of users drawn anew is scored; the published programs scored the step's "
            "own training batch"
        )
    return lines
