"""Optimizers against torch's AdamW and against their formulas; clipping, warm-up, saved state."""

from __future__ import annotations

import math

import pytest
import torch

from generative_recommenders.config.registry import OPTIMIZERS
from generative_recommenders.errors import UserError
from generative_recommenders.training.optimizers import (
    BETAS,
    AdamW,
    LazyAdamW,
    Optimizer,
    RowwiseAdagrad,
    TableOptimizer,
)

ROWS, DIM, RATE, DECAY = 7, 3, 0.01, 0.1
NAMES = ["adamw", "lazy_adamw", "rowwise_adagrad"]


def parameters() -> tuple[torch.nn.Parameter, torch.nn.Parameter, torch.nn.Parameter]:
    """Two dense parameters and a table, always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2), (5,), (ROWS, DIM))
    return tuple(torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes)


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator) for s in ((4, 2), (5,), (ROWS, DIM))]


def optimizer_of(name: str, **options) -> tuple[Optimizer, list[torch.nn.Parameter]]:
    a, b, table = parameters()
    rule = OPTIMIZERS[name].build({}, {"learning_rate": RATE, "weight_decay": DECAY})
    return Optimizer([a, b], table, rule, **options), [a, b, table]


def take(optimizer: Optimizer, ours: list[torch.nn.Parameter], step: int, rows: torch.Tensor | None = None) -> float:
    """One step with the gradients of that number; rows: those of the table that are touched."""
    optimizer.zero_grad()
    *dense, table = gradients(step)
    for parameter, gradient in zip(ours, dense):
        parameter.grad = gradient
    rate = optimizer.rate(step)
    optimizer.update(rate, rows, table if rows is None else table[rows])
    return rate


def torch_adamw(steps: int, rates: list[float] | None = None, scale=lambda grads: 1.0) -> list[torch.nn.Parameter]:
    theirs = list(parameters())
    adamw = torch.optim.AdamW(theirs, lr=RATE, betas=BETAS, weight_decay=DECAY)
    for step in range(steps):
        grads = gradients(step)
        for parameter, gradient in zip(theirs, grads):
            parameter.grad = gradient * scale(grads)
        if rates is not None:
            adamw.param_groups[0]["lr"] = rates[step]
        adamw.step()
    return theirs


@pytest.mark.parametrize("touched", ["all", "every row by number"])
@pytest.mark.parametrize("name", ["adamw", "lazy_adamw"])
def test_with_all_rows_gathered_it_is_torchs_adamw(name: str, touched: str) -> None:
    optimizer, ours = optimizer_of(name)
    for step in range(5):
        take(optimizer, ours, step, None if touched == "all" else torch.arange(ROWS))
    torch.testing.assert_close(ours, torch_adamw(5), rtol=1e-5, atol=1e-6)


def test_adamw_decays_and_moves_untouched_rows() -> None:
    optimizer, ours = optimizer_of("adamw")
    before = ours[2].detach().clone()
    take(optimizer, ours, 0, torch.tensor([1, 4]))
    untouched = [0, 2, 3, 5, 6]
    torch.testing.assert_close(ours[2][untouched].detach(), before[untouched] * (1 - RATE * DECAY))
    once = ours[2].detach().clone()
    take(optimizer, ours, 1, torch.tensor([0]))
    assert (ours[2][[1, 4]] != once[[1, 4]] * (1 - RATE * DECAY)).all()  # their momentum continues


@pytest.mark.parametrize("name", ["lazy_adamw", "rowwise_adagrad"])
def test_row_optimizers_leave_other_rows_alone(name: str) -> None:
    optimizer, ours = optimizer_of(name)
    before = ours[2].detach().clone()
    for step, rows in enumerate([[1, 4], [4], [1]]):
        take(optimizer, ours, step, torch.tensor(rows))
    changed = (ours[2] != before).all(1)
    assert changed.tolist() == [row in (1, 4) for row in range(ROWS)]
    assert torch.equal(ours[2][~changed], before[~changed])


@pytest.mark.parametrize("name", ["lazy_adamw", "rowwise_adagrad"])
def test_a_row_without_gradient_is_untouched_on_the_whole_table_too(name: str) -> None:
    results = []
    for whole in (True, False):
        optimizer, ours = optimizer_of(name)
        for step, rows in enumerate([[1, 4], [4], [1, 6]]):
            optimizer.zero_grad()
            touched, table = torch.tensor(rows), gradients(step)[2]
            every = torch.zeros_like(table).index_copy(0, touched, table[touched])
            optimizer.update(RATE, *((None, every) if whole else (touched, table[touched])))
        results.append(ours[2].detach())
    assert torch.equal(*results)


def test_lazy_adamw_by_its_formula() -> None:
    table = parameters()[2]
    lazy, w = LazyAdamW(table, RATE, DECAY), table.detach().double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for count, rows in enumerate(([0, 3], [3], [0, 5, 6]), start=1):
        grads = gradients(count)[2][rows]
        lazy.step(torch.tensor(rows), grads)
        g = grads.double()
        m[rows] = BETAS[0] * m[rows] + (1 - BETAS[0]) * g
        v[rows] = BETAS[1] * v[rows] + (1 - BETAS[1]) * g**2
        hat_m, hat_v = m[rows] / (1 - BETAS[0] ** count), v[rows] / (1 - BETAS[1] ** count)
        w[rows] = w[rows] * (1 - RATE * DECAY) - RATE * hat_m / (hat_v.sqrt() + 1e-8)
    torch.testing.assert_close(table.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_by_its_formula() -> None:
    table = parameters()[2]
    adagrad, w = RowwiseAdagrad(table, RATE, DECAY), table.detach().double().clone()
    total = torch.zeros(ROWS, dtype=torch.float64)
    for count, rows in enumerate(([0, 3], [3], [0, 5, 6])):
        grads = gradients(count)[2][rows]
        adagrad.step(torch.tensor(rows), grads)
        g = grads.double()
        total[rows] += (g**2).mean(1)
        w[rows] = w[rows] * (1 - RATE * DECAY) - RATE * g / total[rows].sqrt()[:, None]
    torch.testing.assert_close(table.detach().double(), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adagrad.state["sum_of_squares"].double(), total)


@pytest.mark.parametrize("touched", [None, [1, 4]])
def test_the_item_table_may_have_a_rate_of_its_own(touched: list[int] | None) -> None:
    """Which warms up as the run's does; the dense parameters keep theirs."""
    rows, moved, dense = touched and torch.tensor(touched), [], []
    for rate in (None, 10 * RATE):
        rule = OPTIMIZERS["rowwise_adagrad"].build(
            {"item_learning_rate": rate}, {"learning_rate": RATE, "weight_decay": 0.0}
        )
        ours = list(parameters())
        optimizer, before = Optimizer(ours[:2], ours[2], rule, num_warmup_steps=4), ours[2].detach().clone()
        assert [take(optimizer, ours, step, rows) for step in range(2)] == [RATE / 4, RATE / 2]
        moved.append(ours[2].detach() - before)
        dense.append(ours[:2])
    torch.testing.assert_close(moved[1], 10 * moved[0], rtol=1e-4, atol=1e-5)
    assert moved[0].abs().max() > 1e-3
    assert all(torch.equal(one, other) for one, other in zip(*dense))


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear(name: str) -> None:
    optimizer, ours = optimizer_of(name, num_warmup_steps=4)
    rates = [take(optimizer, ours, step) for step in range(6)]
    assert rates == pytest.approx([RATE * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])
    if name != "rowwise_adagrad":
        torch.testing.assert_close(ours, torch_adamw(6, rates), rtol=1e-5, atol=1e-6)


def test_the_rate_falls_along_half_a_cosine_after_the_warm_up() -> None:
    optimizer, ours = optimizer_of("adamw", num_warmup_steps=2, cosine_steps=8)
    rates = [take(optimizer, ours, step) for step in range(9)]
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert rates == pytest.approx([RATE * min(1, (step + 1) / 2) * cosine[step] for step in range(9)])
    assert rates[8] == 0.0


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("name", ["adamw", "lazy_adamw"])
def test_clipping_by_the_norm_of_everything(name: str, max_norm: float) -> None:
    optimizer, ours = optimizer_of(name, max_grad_norm=max_norm)
    for step in range(4):
        take(optimizer, ours, step)

    def scale(grads: list[torch.Tensor]) -> float:
        return min(1.0, max_norm / torch.cat([g.flatten() for g in grads]).norm().item())

    torch.testing.assert_close(ours, torch_adamw(4, scale=scale), rtol=1e-4, atol=1e-5)


def test_clipping_counts_gathered_rows_alone_the_same() -> None:
    results = []
    for rows in (None, torch.tensor([1, 4])):
        optimizer, ours = optimizer_of("adamw", max_grad_norm=0.5)
        optimizer.zero_grad()
        *dense, table = gradients(0)
        ours[0].grad, ours[1].grad = dense
        sparse = torch.zeros_like(table).index_copy(0, torch.tensor([1, 4]), table[[1, 4]])
        optimizer.update(optimizer.rate(0), rows, sparse if rows is None else table[rows])
        results.append([p.detach() for p in ours])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_continues_bit_for_bit(name: str) -> None:
    optimizer, ours = optimizer_of(name, num_warmup_steps=3)
    rows = torch.tensor([0, 2, 5])
    for step in range(3):
        take(optimizer, ours, step, rows)
    resumed, theirs = optimizer_of(name, num_warmup_steps=3)
    with torch.no_grad():
        for mine, other in zip(theirs, ours):
            mine.copy_(other)
    saved = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    resumed.load_state_tensors(saved)
    for step in range(3, 6):
        take(optimizer, ours, step, rows + 1)
        take(resumed, theirs, step, rows + 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    later = resumed.state_tensors()
    assert set(later) == set(saved)
    assert all(torch.equal(later[key], value) for key, value in optimizer.state_tensors().items())
    assert any(not torch.equal(later[key], saved[key]) for key in saved)


def test_state_before_the_first_step() -> None:
    for name in NAMES:
        optimizer, _ = optimizer_of(name)
        resumed, ours = optimizer_of(name)
        resumed.load_state_tensors(optimizer.state_tensors())
        take(resumed, ours, 0)
        plain, theirs = optimizer_of(name)
        take(plain, theirs, 0)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_dense_parameters_without_a_gradient_stay() -> None:
    optimizer, ours = optimizer_of("lazy_adamw", max_grad_norm=1.0)
    before = ours[1].detach().clone()
    optimizer.zero_grad()
    ours[0].grad = gradients(0)[0]
    optimizer.update(optimizer.rate(0), None, gradients(0)[2])
    assert torch.equal(ours[1], before)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="unknown optimizer 'sgd' .*known: adamw, lazy_adamw, rowwise_adagrad"):
        optimizer_of("sgd")


class Momentum(AdamW):
    """As a plug-in would: torch's SGD with momentum for everything."""

    def dense(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)


def test_a_rule_of_ones_own_trains_and_its_state_is_checked() -> None:
    a, b, table = parameters()
    optimizer = Optimizer([a, b], table, Momentum(RATE, DECAY), num_warmup_steps=2)
    take(optimizer, [a, b, table], 0)
    torch.testing.assert_close(table, parameters()[2] - RATE / 2 * gradients(0)[2])
    saved = optimizer.state_tensors()
    optimizer.load_state_tensors(saved)
    del saved["adamw.1.momentum_buffer"]
    saved["adamw.1.exp_avg"] = torch.zeros(5)
    with pytest.raises(UserError, match="does not fit the configuration: adamw.1.exp_avg"):
        optimizer.load_state_tensors(saved)


@pytest.mark.parametrize("kind", [LazyAdamW, RowwiseAdagrad])
@pytest.mark.parametrize("whole", [True, False], ids=["whole table", "rows, the last one repeated"])
def test_rows_that_are_not_touched_stay(
    kind: type[TableOptimizer], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, expected = (kind(parameters()[2], RATE, DECAY) for _ in range(2))
    for step in range(5):
        grads = gradients(step)[2]
        grads[[step, 6]] = 0.0
        touched = grads.any(1).nonzero()[:, 0]
        rows = None if whole else torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 5, 5])
        taken = grads if rows is None else grads[rows]
        with monkeypatch.context() as accelerator:  # where all rows are updated at once
            accelerator.setattr("generative_recommenders.ops.dispatch.waits", lambda x: True)
            ours.step(rows, taken)
        expected.step(touched, grads[touched])
        torch.testing.assert_close(ours.table, expected.table)
        for name, value in expected.state.items():
            torch.testing.assert_close(ours.state[name], value)
        assert torch.equal(ours.table[6], parameters()[2][6])


@pytest.mark.parametrize("kind", [LazyAdamW, RowwiseAdagrad])
@pytest.mark.parametrize("whole", [True, False])
def test_many_rows_are_updated_as_few(kind: type[TableOptimizer], whole: bool) -> None:
    """Many go in parts, whose number of threads changes nothing."""
    count, generator = 100_000, torch.Generator().manual_seed(0)
    weights = torch.randn(count, DIM, generator=generator)
    ours, expected = (kind(torch.nn.Parameter(weights.clone()), RATE, DECAY) for _ in range(2))
    for _ in range(2):
        rows = torch.arange(count) if whole else torch.randperm(count, generator=generator)[: count // 2]
        grads = torch.randn(len(rows), DIM, generator=generator)
        grads[::7] = 0.0
        ours.step(None if whole else rows, grads)
        touched = grads.any(1)
        expected.step(rows[touched], grads[touched])
    torch.testing.assert_close(ours.table, expected.table)
    for name, value in expected.state.items():
        torch.testing.assert_close(ours.state[name], value)


def test_the_norm_of_no_gradient_is_0():
    optimizer, ours = optimizer_of("adamw", max_grad_norm=1.0)
    optimizer.zero_grad()
    assert optimizer.gradient_norm(None) == 0.0
    optimizer.update(RATE, None, None)
    assert all(torch.equal(one, other) for one, other in zip(ours, parameters()))
