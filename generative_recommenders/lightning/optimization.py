"""Factories of optimizers and learning rate schedules, with RePlay's arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch

from generative_recommenders.errors import UserError

OptimizerName = Literal["adam", "adamw", "sgd"]


class BaseOptimizerFactory(ABC):
    """Factory of `LightningModule`'s optimizer."""

    @abstractmethod
    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""


class OptimizerFactory(BaseOptimizerFactory):
    """optimizer: "adam", "adamw" (the program's own) or "sgd". betas: of the first two; sgd_momentum: of the last."""

    def __init__(
        self,
        optimizer: OptimizerName = "adam",
        learning_rate: float = 0.001,
        weight_decay: float = 0.0,
        sgd_momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        if optimizer not in (names := get_args(OptimizerName)):
            raise UserError(f"OptimizerFactory: optimizer {optimizer!r} is none of {', '.join(names)}")
        self.optimizer = optimizer
        self.shared: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        self.sgd_momentum, self.betas = sgd_momentum, betas

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=self.sgd_momentum, **self.shared)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, betas=self.betas, **self.shared)


class BaseLRSchedulerFactory(ABC):
    """Factory of `LightningModule`'s learning rate schedule."""

    @abstractmethod
    def create(self, optimizer: torch.optim.Optimizer) -> Any:
        """A schedule, or Lightning's dictionary of one and its interval."""


class LRSchedulerFactory(BaseLRSchedulerFactory):
    """The rate times gamma every decay_step epochs."""

    def __init__(self, decay_step: int = 25, gamma: float = 1.0) -> None:
        self.decay_step, self.gamma = decay_step, gamma

    def create(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, self.decay_step, self.gamma)


class LambdaLRSchedulerFactory(BaseLRSchedulerFactory):
    """The rate times warmup_lr for the first warmup_steps epochs (or steps, by update_interval), times normal_lr
    afterwards."""

    def __init__(
        self,
        warmup_steps: int,
        warmup_lr: float = 1.0,
        normal_lr: float = 0.1,
        update_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if min(warmup_lr, normal_lr) <= 0:
            raise UserError(f"LambdaLRSchedulerFactory: rates must be above 0, not {warmup_lr} and {normal_lr}")
        self.warmup_steps, self.warmup_lr, self.normal_lr = warmup_steps, warmup_lr, normal_lr
        self.update_interval = update_interval

    def create(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        def factor(step: int) -> float:
            return self.warmup_lr if step < self.warmup_steps else self.normal_lr

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"scheduler": schedule, "interval": self.update_interval, "frequency": 1}
