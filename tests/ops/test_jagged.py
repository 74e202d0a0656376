"""Jagged <-> padded: fbgemm against the plain references, values and gradients, and the choice between them."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops import dispatch, jagged
from generative_recommenders.ops.jagged import jagged_to_padded, padded_to_jagged
from generative_recommenders.ops.layout import jagged_layout

LENGTHS = [2, 0, 5, 1, 0]
OFFSETS = torch.tensor([0, 2, 2, 7, 8, 8])


@pytest.fixture(params=["reference", "fbgemm"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the plain references, and with fbgemm where it works here."""
    if request.param == "fbgemm":
        if not dispatch.fbgemm_runs_on("cpu"):
            pytest.skip("no working fbgemm")
        yield request.param
    else:
        with dispatch.references():
            yield request.param


@pytest.mark.parametrize("trailing", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_both_directions(way: str, trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.arange(1, 1 + 8 * max(1, torch.Size(trailing).numel())).view(8, *trailing).to(dtype)
    dense = jagged_to_padded(values, OFFSETS, 6)
    assert dense.dtype == dtype
    for row, length in enumerate(LENGTHS):
        assert torch.equal(dense[row, :length], values[OFFSETS[row] : OFFSETS[row + 1]])
        assert not dense[row, length:].any()
    assert torch.equal(padded_to_jagged(dense, OFFSETS, 8), values)


def test_integers_beyond_a_floats_precision(way: str) -> None:
    values = torch.tensor([2**62 + 1, 2**53 + 1, -(2**63)])
    dense = jagged_to_padded(values, torch.tensor([0, 1, 3]), 2)
    assert dense.tolist() == [[2**62 + 1, 0], [2**53 + 1, -(2**63)]]
    assert torch.equal(padded_to_jagged(dense, torch.tensor([0, 1, 3]), 3), values)


def test_rows_longer_than_the_rectangle_are_cut_at_the_end(way: str) -> None:
    values, offsets = torch.arange(10.0).view(5, 2), torch.tensor([0, 4, 5])
    assert torch.equal(jagged_to_padded(values, offsets, 3)[0], values[:3])
    assert torch.equal(jagged_to_padded(values, offsets, 3)[1, 0], values[4])


@pytest.mark.parametrize("width", [6, 3])
def test_padding_equals_its_reference_with_gradients(width: int) -> None:
    values = torch.randn(8, 2, 3, requires_grad=True)
    ways = jagged_to_padded, jagged.jagged_to_padded_reference
    assert_same(*(way(values, OFFSETS, width) for way in ways), [values], rtol=0, atol=0)


def test_taking_tokens_out_equals_its_reference_with_gradients() -> None:
    dense = torch.randn(5, 6, 3, requires_grad=True)
    ways = padded_to_jagged, jagged.padded_to_jagged_reference
    assert_same(*(way(dense, OFFSETS, 8) for way in ways), [dense], rtol=0, atol=0)


def test_references_have_the_gradients_of_differences() -> None:
    values = torch.rand(8, 3, dtype=torch.float64, requires_grad=True)
    dense = torch.rand(5, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: jagged.jagged_to_padded_reference(x, OFFSETS, 6), values)
    assert torch.autograd.gradcheck(lambda x: jagged.padded_to_jagged_reference(x, OFFSETS, 8), dense)


def test_no_tokens(way: str) -> None:
    offsets = torch.zeros(3, dtype=torch.int64)
    assert jagged_to_padded(torch.zeros(0, 2), offsets, 3).tolist() == torch.zeros(2, 3, 2).tolist()
    assert padded_to_jagged(torch.zeros(2, 3, 2), offsets, 0).shape == (0, 2)


def test_layouts_convert_by_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rectangles of ids and events that every training and evaluation batch begins with."""
    if not dispatch.fbgemm_runs_on("cpu"):
        pytest.skip("no working fbgemm")
    called = []
    real = torch.ops.fbgemm.dense_to_jagged
    monkeypatch.setattr(torch.ops.fbgemm, "dense_to_jagged", lambda *args: called.append(1) or real(*args))
    layout = jagged_layout(torch.tensor(LENGTHS), 6)
    ids = torch.arange(1, 31).view(5, 6)
    tokens = layout.flatten(ids)
    assert called
    assert tokens.tolist() == [1, 2, 13, 14, 15, 16, 17, 19]
    with dispatch.references():
        assert torch.equal(jagged_layout(torch.tensor(LENGTHS), 6).flatten(ids), tokens)


def test_without_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not dispatch.fbgemm_runs_on.__wrapped__("cpu")


@pytest.mark.parametrize("fault", [OSError("undefined symbol: _ZN3c10\nin file x.so"), TypeError("overload 3")])
def test_a_broken_fbgemm_is_named_in_one_warning(
    fault: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(name: str) -> None:
        logging.getLogger().error("could not load the library")
        print("and more of it", file=sys.stderr)
        raise fault

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert not dispatch.fbgemm_runs_on.__wrapped__("cpu")
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert torch.__version__ in message and str(fault).splitlines()[0] in message and "\n" not in message
    assert "more of it" not in capfd.readouterr().err
    assert logging.root.manager.disable == logging.NOTSET


def test_an_import_that_logs_first_does_not_take_the_process_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python process that has not set logging up: its warnings must not end in the output that is thrown away."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: logging.info("imported"))
    dispatch.fbgemm_fault("cpu")
    assert logging.root.handlers == []
