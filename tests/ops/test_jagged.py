"""Jagged <-> padded by fbgemm and by torch: equal numbers and gradients, and why a backend was chosen."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys

import pytest
import torch

from generative_recommenders.ops import jagged
from generative_recommenders.ops.jagged import jagged_to_padded, padded_to_jagged

BACKENDS = ["torch", "fbgemm"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each backend that works here."""
    if request.param == "fbgemm" and jagged.backend()[0] != "fbgemm":
        pytest.skip(jagged.backend()[1])
    monkeypatch.setattr(jagged, "backend", lambda: (request.param, "chosen by the test"))
    return request.param


@pytest.mark.parametrize("trailing", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_both_directions(backend: str, trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    lengths = [2, 0, 5, 1, 0]
    offsets = torch.tensor([0, 2, 2, 7, 8, 8])
    values = torch.arange(1, 1 + 8 * max(1, torch.Size(trailing).numel())).view(8, *trailing).to(dtype)
    dense = jagged_to_padded(values, offsets, 6)
    assert dense.dtype == dtype
    for row, length in enumerate(lengths):
        assert torch.equal(dense[row, :length], values[offsets[row] : offsets[row + 1]])
        assert not dense[row, length:].any()
    assert torch.equal(padded_to_jagged(dense, offsets, 8), values)


def test_rows_longer_than_the_rectangle_are_cut_at_the_end(backend: str) -> None:
    values, offsets = torch.arange(10.0).view(5, 2), torch.tensor([0, 4, 5])
    assert torch.equal(jagged_to_padded(values, offsets, 3)[0], values[:3])
    assert torch.equal(jagged_to_padded(values, offsets, 3)[1, 0], values[4])


def test_gradients(backend: str) -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    values = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    dense = torch.rand(3, 4, 3, dtype=torch.float64, requires_grad=True)
    to_padded = functools.partial(jagged_to_padded, offsets=offsets, max_length=4)
    to_jagged = functools.partial(padded_to_jagged, offsets=offsets, num_tokens=5)
    assert torch.autograd.gradcheck(to_padded, values)
    assert torch.autograd.gradcheck(to_jagged, dense)


def test_no_tokens(backend: str) -> None:
    offsets = torch.zeros(3, dtype=torch.int64)
    assert jagged_to_padded(torch.zeros(0, 2), offsets, 3).tolist() == torch.zeros(2, 3, 2).tolist()
    assert padded_to_jagged(torch.zeros(2, 3, 2), offsets, 0).shape == (0, 2)


def test_variable_turns_fbgemm_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jagged.DISABLE_VARIABLE, "1")
    assert jagged.backend.__wrapped__() == ("torch", f"{jagged.DISABLE_VARIABLE}=1")


def test_without_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(jagged.DISABLE_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert jagged.backend.__wrapped__() == ("torch", "fbgemm_gpu is not installed")


def test_mismatched_pair_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> None:
        raise OSError("undefined symbol: _ZN3c10\nin file x.so")

    monkeypatch.delenv(jagged.DISABLE_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jagged.importlib, "import_module", broken)
    name, why = jagged.backend.__wrapped__()
    assert name == "torch"
    assert torch.__version__ in why
    assert "_ZN3c10" in why
    assert "\n" not in why
    monkeypatch.setattr(jagged, "backend", lambda: (name, why))
    absl_logger = logging.getLogger("absl")
    monkeypatch.setattr(absl_logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger="absl"):
        jagged.log_backend()
    assert [(record.levelno, why in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_a_library_that_fails_in_its_own_way_is_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        logging.getLogger().error("could not load the library")
        print("and more of it", file=sys.stderr)
        raise TypeError("Tensor has no overload 3")

    monkeypatch.delenv(jagged.DISABLE_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jagged.importlib, "import_module", broken)
    monkeypatch.setattr(jagged.importlib.metadata, "version", lambda name: "0.1.2")
    name, why = jagged.backend.__wrapped__()
    assert name == "torch"
    assert f"fbgemm-gpu-cpu 0.1.2 does not fit torch {torch.__version__}: Tensor has no overload 3" in why
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET
