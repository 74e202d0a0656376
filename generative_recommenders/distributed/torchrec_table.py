"""Rows of a sharded table that TorchRec keeps and exchanges, and fbgemm updates by row-wise Adagrad in the backward
pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError

TABLE, FEATURE = "item_table", "item_id"
EPSILON = 1e-10
"""Beside the root of the accumulator, as in `training.optimizers.RowwiseAdagrad`."""


class TorchRecTable:
    """Rows of this process of a table ``[num_rows, width]``, in row-wise shards of TorchRec; see `RowShard` for which.

    ``weight [rows, width]`` and ``sum_of_squares [rows]`` float32, Adagrad's accumulator, are the memory that lookups
    read and updates write. All methods are called by all processes together. UserError where TorchRec is not installed,
    or for a width that fbgemm cannot hold.
    """

    def __init__(self, num_rows: int, width: int, collectives: Collectives) -> None:
        if width % 4:
            raise UserError(
                f"train_fn.item_table 'torchrec' needs an item_embedding_dim that 4 divides, not {width}: fbgemm reads "
                "four numbers at once"
            )
        try:
            self.sharded = _sharded_collection(num_rows, width, collectives)
        except (ImportError, OSError) as error:
            # An OSError: fbgemm's CUDA build lacks its libraries where there is no CUDA.
            raise UserError(
                f"train_fn.item_table 'torchrec' needs TorchRec in an environment of its own ({error}): see "
                "docs/scale.md, or set 'sharded'"
            ) from error
        self.weight: torch.Tensor = self.sharded.state_dict()[f"embeddings.{TABLE}.weight"].local_tensor()
        (state,) = self.sharded.fused_optimizer.state_dict()["state"].values()
        self.sum_of_squares: torch.Tensor = state[f"{TABLE}.momentum1"].local_tensor()
        self.read: torch.Tensor | None = None

    def lookup(self, ids: torch.Tensor, *, learns: bool = False) -> torch.Tensor:
        """``[U, width]`` rows of ``ids [U]`` int64, in their order. learns: `update` will follow, if anything does."""
        from torchrec import KeyedJaggedTensor

        # fbgemm looks up for a backward pass alone, and keeps what it read: in evaluation that is dropped with the
        # rows.
        with torch.inference_mode(False), torch.enable_grad():
            lengths = torch.tensor([len(ids)], device=ids.device)
            batch = KeyedJaggedTensor(keys=[FEATURE], values=ids.clone(), lengths=lengths)
            rows: torch.Tensor = self.sharded(batch)[FEATURE].values()
        if learns:
            self.read = rows
        return rows.detach()

    def set_learning_rate(self, rate: float) -> None:
        """Of updates whose rows are looked up from now on."""
        optimizer = self.sharded.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()  # hands it over, and updates nothing

    def update(self, gradients: torch.Tensor) -> None:
        """One step of Adagrad on the rows of the last `lookup`, by the sums over processes of
        ``gradients [U, width]``."""
        assert self.read is not None  # a lookup goes before
        self.read.backward(gradients)
        self.read = None


def _sharded_collection(num_rows: int, width: int, collectives: Collectives) -> Any:
    """TorchRec's embeddings of one table, dealt to the processes by rows; ImportError without TorchRec."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed import ShardingEnv
    from torchrec.distributed.comm_ops import set_gradient_division
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise

    set_gradient_division(False)  # gradients come to `update` divided already
    device, world = collectives.device, collectives.world_size
    table = EmbeddingConfig(name=TABLE, embedding_dim=width, num_embeddings=num_rows, feature_names=[FEATURE])
    module = EmbeddingCollection(tables=[table], device=torch.device("meta"))
    sharder = EmbeddingCollectionSharder(fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "eps": EPSILON})
    plan = construct_module_sharding_plan(
        module, {TABLE: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)}, sharder=sharder,
        local_size=world, world_size=world, device_type=device.type,
    )  # fmt: skip
    # Rows are drawn that are not kept: the run's own draws must not depend on them.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return sharder.shard(module, plan, ShardingEnv.from_process_group(dist.group.WORLD), device)
