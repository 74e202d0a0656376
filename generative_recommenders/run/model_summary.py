"""Parts, parameters and memory of what would be trained, for ``--dry_run``."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from generative_recommenders.data.loader import LoadedBatch, event_values
from generative_recommenders.training.trainer import Trainer

MIB = 2**20


def model_summary(trainer: Trainer) -> str:
    """Parts, parameter counts and an estimate of memory."""
    model, criterion = trainer.model, trainer.task.criterion
    counts = parameter_counts([*model.named_children(), ("criterion", criterion)])
    total = sum(counts.values())
    trained = {p for part in (model, criterion) for p in part.parameters() if p.requires_grad}
    held = total + 3 * sum(p.numel() for p in trained)  # gradients and two moments
    by_rows = trainer.settings.updates.optimizer == "rowwise_adagrad"  # one number a row of the item table
    if by_rows and model.items.table.requires_grad:
        held -= 2 * counts["items"]
    lines = [str(model), str(criterion), ""]
    lines += [f"{name:<16}{count:>14,} parameters" for name, count in counts.items()]
    lines += [
        f"{'total':<16}{total:>14,} parameters",
        f"memory, estimated: {held * 4 / MIB:,.0f} MiB weights, gradients and optimizer state; "
        f"at most {kept_activations(trainer) / MIB:,.0f} MiB that a full batch keeps for its backward pass",
    ]
    return "\n".join(lines)


def parameter_counts(parts: Iterable[tuple[str, torch.nn.Module]]) -> dict[str, int]:
    """Parameters of each part, by name; those that two parts share count once."""
    counts: dict[str, int] = {}
    seen: set[torch.nn.Parameter] = set()
    for name, part in parts:
        own = set(part.parameters()) - seen
        counts[name], seen = sum(parameter.numel() for parameter in own), seen | own
    return counts


def kept_activations(trainer: Trainer) -> float:
    """Bytes that the forward pass of a full batch keeps for its backward pass.

    What grows with the histories is extrapolated from one and two of full length; what is as long as the gathered rows
    of the item table is counted for all of it. Blocks of MoL that a large batch computes again count as kept: an upper
    bound.
    """
    dataset, width = trainer.dataset, trainer.settings.data.max_sequence_length + 1

    def kept_by(rows: int) -> tuple[float, float]:
        """Bytes kept by this many histories: what grows with them, and what grows with the item table."""
        places = torch.arange(rows * width).view(rows, width)
        events = event_values(dataset, places.numpy() % dataset.num_events)
        columns = {name: torch.from_numpy(values) for name, values in events.items()} | {
            "user_ids": torch.arange(1, rows + 1),
            "lengths": torch.full((rows,), width),
            "item_ids": places % dataset.num_items + 1,
        }
        batch = trainer.task.prepare(LoadedBatch(columns, 0, 0, 0, 0), 0)
        # By storage, so that views of one tensor count once.
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            leaf = trainer.step.forward(batch)[0].weight
        for owned in (leaf, *trainer.task.parameters()):
            kept.pop(owned.untyped_storage().data_ptr(), None)
        gathered, items = leaf.shape[0], trainer.model.items.table.shape[0]
        sizes = [(x.shape[:1] == (gathered,), x.untyped_storage().nbytes()) for x in kept.values()]
        table = sum(size for is_table, size in sizes if is_table) * items / gathered
        return sum(size for is_table, size in sizes if not is_table), table

    (one, one_table), (two, two_table) = map(kept_by, (1, 2))
    return one + (two - one) * (trainer.settings.schedule.local_batch_size - 1) + max(one_table, two_table)
