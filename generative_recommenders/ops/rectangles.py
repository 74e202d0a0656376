"""Gather and scatter between jagged tokens and padded attention tiles, as copies by index in both passes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rectangles:
    """Rectangles ``[rows, columns]`` of tokens, one after the other in memory.

    shapes: rows and columns of each.
    tokens: ``[cells]`` int32, the token in each cell; cells past the end of a sequence repeat its last token.
    real: ``[cells]`` bool, False past the end of a sequence.

    With H heads a rectangle is ``[rows, H, columns]``.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: torch.Tensor
    real: torch.Tensor

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, H, d]`` tokens as cells ``[cells * H, d]``, a copy."""
        (count, heads, width), pitch = x.shape, x.stride(0) // max(1, x.shape[2])
        if x.stride() == (pitch * width, width, 1) and pitch >= heads:
            # a slice of a wider projection: rows of d, of which there are pitch from a token to the next, without a
            # copy
            rows = x.as_strided((max(0, (count - 1) * pitch + heads), width), (width, 1))
        else:
            rows, pitch = x.reshape(-1, width), heads
        return rows.index_select(0, self._index(heads, pitch))

    def split(self, cells: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Cells ``[cells * H, d]`` as a view ``[rows * H, columns, d]`` of each rectangle."""
        parts = cells.split([heads * rows * columns for rows, columns in self.shapes])
        return [part.view(-1, shape[1], part.shape[1]) for part, shape in zip(parts, self.shapes)]

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """Room for the cells of what has the form of ``x [T, H, d]``."""
        return x.new_empty(self.tokens.numel() * x.shape[1], x.shape[2])

    def hide_padding(self, cells: torch.Tensor, heads: int) -> torch.Tensor:
        """``[cells * H, d]`` in place: 0 past the end of a sequence."""
        if heads not in self._memo:
            weights = self.real.to(cells.dtype)
            self._memo[heads] = self._for_heads(weights, weights.new_zeros(heads))[:, None]
        return cells.mul_(self._memo[heads])

    def _index(self, heads: int, pitch: int) -> torch.Tensor:
        """``[cells * H]`` int32: the row that each cell holds, where token t's heads are the rows from ``t * pitch``
        on."""
        if pitch == 1:
            return self.tokens
        if (heads, pitch) not in self._memo:
            head = torch.arange(heads, dtype=torch.int32, device=self.tokens.device)
            self._memo[heads, pitch] = self._for_heads(self.tokens * pitch, head)
        return self._memo[heads, pitch]

    def _for_heads(self, values: torch.Tensor, by_head: torch.Tensor) -> torch.Tensor:
        """``[cells * H]``: what each cell of each head gets of ``values [cells]`` and ``by_head [H]``."""
        parts = self.split(values[:, None], 1)
        return torch.cat([(part.mT + by_head[:, None]).flatten() for part in parts])

    @functools.cached_property
    def _memo(self) -> dict[int | tuple[int, int], torch.Tensor]:
        """What `hide_padding` and `_index` made: every block of an encoder asks the same."""
        return {}


@dataclass(frozen=True)
class Places:
    """Where tokens lie among the cells of rectangles.

    cells: ``[T]`` int32, a token's cell. runs: ``[R]`` int32, the first cells of all rows of all rectangles, and the
    number of cells.
    """

    cells: torch.Tensor
    runs: torch.Tensor

    def ungather(self, cells: torch.Tensor, heads: int) -> torch.Tensor:
        """``[cells * H, d]`` as tokens ``[T, H, d]``, a copy."""
        return cells.index_select(0, self._index(heads)).view(-1, heads, cells.shape[1])

    def _index(self, heads: int) -> torch.Tensor:
        """``[T * H]`` int32."""
        if heads == 1:
            return self.cells
        if heads not in self._indices:
            # A rectangle is [rows, H, columns]: head h of a row lies h times its columns after the first head.
            run = torch.searchsorted(self.runs, self.cells, right=True)
            first = self.runs[run - 1]
            columns = self.runs[run] - first
            head = torch.arange(heads, dtype=torch.int32, device=self.cells.device)
            of_first_head = self.cells + (heads - 1) * first
            self._indices[heads] = (of_first_head[:, None] + head * columns[:, None]).flatten()
        return self._indices[heads]

    @functools.cached_property
    def _indices(self) -> dict[int, torch.Tensor]:
        """What `_index` found: every block of an encoder asks the same."""
        return {}


def places(each: Sequence[Rectangles], num_tokens: int) -> Places:
    """Where the tokens lie that these rectangles hold for real, on the CPU."""
    cells = np.empty(num_tokens, np.int32)
    if each:
        tokens = np.concatenate([rectangles.tokens.numpy() for rectangles in each])
        held = np.flatnonzero(np.concatenate([rectangles.real.numpy() for rectangles in each]))
        cells[tokens[held]] = held
    return Places(torch.from_numpy(cells), _runs(each))


def places_of_all(rectangles: Rectangles) -> Places:
    """Where the tokens lie, each of which has one cell, padding among them; no number is looked at."""
    device = rectangles.tokens.device
    return Places(rectangles.tokens.argsort().to(torch.int32), _runs([rectangles]).to(device))


def _runs(each: Sequence[Rectangles]) -> torch.Tensor:
    shapes = np.array([shape for rectangles in each for shape in rectangles.shapes], np.int64).reshape(-1, 2)
    return torch.tensor([0, *np.repeat(shapes[:, 1], shapes[:, 0]).cumsum().tolist()], dtype=torch.int32)
