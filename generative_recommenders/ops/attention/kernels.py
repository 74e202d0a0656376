"""Triton kernels of causal attention on jagged tokens: softmax, and pointwise SiLU with a relative bias.

One program computes a block of queries (or, for the gradients of keys and values, a block of keys) of one row and head.
Tokens are read where they lie, and no rectangle of weights is kept: the backward pass computes them again. Gradients
are never added by atomics, so that every run gives the same bits.

``[T, H, d]`` tensors have a step from token to token and from head to head; a row has ``length`` tokens from ``start``
on. ``width`` is the longest row, ``reach`` the N of ``position [2 N - 1]``; ``buckets [B, n, n]`` name entries of
``time``. With SOFTMAX weights are softmax(logits), else silu(logits); both are scaled by ``weight_scale``, which has
dropout's scale in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

BUCKETS = tl.constexpr(128)
"""Time buckets that are summed together; one more is beyond all times that occur."""


@triton.jit
def _tokens(x, rows, length, step, columns, COUNT: tl.constexpr):
    """``[rows, columns]`` of a row's tokens, 0 past its end."""
    mask = (rows[:, None] < length) & (columns[None, :] < COUNT)
    return tl.load(x + rows[:, None] * step + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(
    q, k, row, i, j, length, position, time, buckets, width, reach, logit_scale,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a block of queries i and keys j, and which pairs count."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * logit_scale
    i, j = i[:, None], j[None, :]
    seen = (j <= i) & (i < length)
    if HAS_POSITION:
        logits += tl.load(position + (reach - 1 + j - i), mask=seen, other=0.0)
    if HAS_TIME:
        own = buckets + row.to(tl.int64) * width * width
        bucket = tl.load(own + (i * width + j), mask=seen, other=0).to(tl.int32)
        logits += tl.load(time + bucket, mask=seen, other=0.0)
    return logits, seen


@triton.jit
def _kept(seed, cell, i, j, width, rate):
    """Which weights dropout keeps; the same in both passes."""
    return tl.rand(tl.load(seed), (cell * width + i[:, None]) * width + j[None, :]) >= rate


@triton.jit
def forward(
    q, k, v, out, normalisers, starts, lengths, position, time, buckets, seed,
    q_token, q_head, k_token, k_head, v_token, v_head, width, reach, logit_scale, weight_scale, rate,
    H: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr, BQK: tl.constexpr, BV: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attended values ``[T, H, dv]``, and for softmax ``normalisers [T, H]``: ln sum exp of each query's logits."""
    row, head = tl.program_id(2), tl.program_id(1)
    cell = row * H + head
    start, length = tl.load(starts + row), tl.load(lengths + row).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    q += start * q_token + head * q_head
    k += start * k_token + head * k_head
    v += start * v_token + head * v_head
    i, d, e = first + tl.arange(0, BLOCK), tl.arange(0, BQK), tl.arange(0, BV)
    q_tile = _tokens(q, i, length, q_token, d, DQK)
    attended = tl.zeros([BLOCK, BV], dtype=tl.float32)
    top = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, tl.minimum(first + BLOCK, length), BLOCK):
        j = begin + tl.arange(0, BLOCK)
        k_tile = _tokens(k, j, length, k_token, d, DQK)
        v_tile = _tokens(v, j, length, v_token, e, DV)
        logits, seen = _logits(
            q_tile, k_tile, row, i, j, length, position, time, buckets, width, reach, logit_scale,
            HAS_POSITION, HAS_TIME, PRECISION,
        )  # fmt: skip
        if SOFTMAX:
            logits = tl.where(seen, logits, -float("inf"))
            higher = tl.maximum(top, tl.max(logits, axis=1))
            higher = tl.where(i < length, higher, 0.0)  # queries past the row's end see nothing
            weights = tl.exp(logits - higher[:, None])
            kept_share = tl.exp(top - higher)
            total = total * kept_share + tl.sum(weights, axis=1)
            attended *= kept_share[:, None]
            top = higher
        else:
            weights = tl.where(seen, logits * tl.sigmoid(logits), 0.0)
        if DROPOUT:
            weights = tl.where(_kept(seed, cell, i, j, width, rate), weights, 0.0)
        attended += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    attended *= weight_scale
    if SOFTMAX:
        attended = attended / total[:, None]
        tl.store(normalisers + (start + i) * H + head, top + tl.log(total), mask=i < length)
    mask = (i[:, None] < length) & (e[None, :] < DV)
    tl.store(out + ((start + i[:, None]) * H + head) * DV + e[None, :], attended, mask=mask)


@triton.jit
def _gradients(
    q, k, v, out, d_out, row, cell, i, j, length, normalisers, position, time, buckets, seed,
    width, reach, logit_scale, weight_scale, rate, H: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of queries i and keys j: weights as values are multiplied by, gradients of the logits, and which pairs
    count.

    Gradients of silu: s (1 + x (1 - s)); of softmax: p (dp - sum dp p), where the sum is that of d_out times out.
    """
    logits, seen = _logits(
        q, k, row, i, j, length, position, time, buckets, width, reach, logit_scale,
        HAS_POSITION, HAS_TIME, PRECISION,
    )  # fmt: skip
    kept = seen
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION) * weight_scale
    if DROPOUT:
        kept = _kept(seed, cell, i, j, width, rate)
        d_weights = tl.where(kept, d_weights, 0.0)
    if SOFTMAX:
        normaliser = tl.load(normalisers + i * H, mask=i < length, other=0.0)
        weights = tl.where(seen, tl.exp(logits - normaliser[:, None]), 0.0)
        along = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
        d_logits = weights * (d_weights - along[:, None])
    else:
        s = tl.sigmoid(logits)
        weights = tl.where(seen, logits * s, 0.0)
        d_logits = tl.where(seen, d_weights * s * (1.0 + logits * (1.0 - s)), 0.0)
    if DROPOUT:
        weights = tl.where(kept, weights, 0.0)
    return weights * weight_scale, d_logits, seen


@triton.jit
def backward_queries(
    q, k, v, out, normalisers, d_out, d_q, d_logits, starts, lengths, position, time, buckets, seed,
    q_token, q_head, k_token, k_head, v_token, v_head, width, reach, logit_scale, weight_scale, rate,
    H: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr, BQK: tl.constexpr, BV: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and, where there is a bias, of the logits ``[B, H, n, n]`` that count."""
    row, head = tl.program_id(2), tl.program_id(1)
    cell = row * H + head
    start, length = tl.load(starts + row), tl.load(lengths + row).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    q += start * q_token + head * q_head
    k += start * k_token + head * k_head
    v += start * v_token + head * v_head
    i, d, e = first + tl.arange(0, BLOCK), tl.arange(0, BQK), tl.arange(0, BV)
    q_tile = _tokens(q, i, length, q_token, d, DQK)
    d_out_tile = _tokens(d_out + (start * H + head) * DV, i, length, H * DV, e, DV)
    out_tile = d_out_tile
    if SOFTMAX:
        out_tile = _tokens(out + (start * H + head) * DV, i, length, H * DV, e, DV)
    own_normalisers = normalisers + start * H + head
    total = tl.zeros([BLOCK, BQK], dtype=tl.float32)
    for begin in range(0, tl.minimum(first + BLOCK, length), BLOCK):
        j = begin + tl.arange(0, BLOCK)
        k_tile = _tokens(k, j, length, k_token, d, DQK)
        v_tile = _tokens(v, j, length, v_token, e, DV)
        _, gradients, seen = _gradients(
            q_tile, k_tile, v_tile, out_tile, d_out_tile, row, cell, i, j, length, own_normalisers,
            position, time, buckets, seed, width, reach, logit_scale, weight_scale, rate,
            H, SOFTMAX, HAS_POSITION, HAS_TIME, DROPOUT, PRECISION,
        )  # fmt: skip
        if HAS_POSITION:
            own = d_logits + cell.to(tl.int64) * width * width
            tl.store(own + (i[:, None] * width + j[None, :]), gradients, mask=seen)
        total += tl.dot(gradients.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    mask = (i[:, None] < length) & (d[None, :] < DQK)
    tl.store(d_q + ((start + i[:, None]) * H + head) * DQK + d[None, :], total * logit_scale, mask=mask)


@triton.jit
def backward_keys(
    q, k, v, out, normalisers, d_out, d_k, d_v, starts, lengths, position, time, buckets, seed,
    q_token, q_head, k_token, k_head, v_token, v_head, width, reach, logit_scale, weight_scale, rate,
    H: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr, BQK: tl.constexpr, BV: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values."""
    row, head = tl.program_id(2), tl.program_id(1)
    cell = row * H + head
    start, length = tl.load(starts + row), tl.load(lengths + row).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    if first >= length:
        return
    q += start * q_token + head * q_head
    k += start * k_token + head * k_head
    v += start * v_token + head * v_head
    j, d, e = first + tl.arange(0, BLOCK), tl.arange(0, BQK), tl.arange(0, BV)
    k_tile = _tokens(k, j, length, k_token, d, DQK)
    v_tile = _tokens(v, j, length, v_token, e, DV)
    own_normalisers = normalisers + start * H + head
    d_k_tile = tl.zeros([BLOCK, BQK], dtype=tl.float32)
    d_v_tile = tl.zeros([BLOCK, BV], dtype=tl.float32)
    for begin in range(first, length, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        q_tile = _tokens(q, i, length, q_token, d, DQK)
        d_out_tile = _tokens(d_out + (start * H + head) * DV, i, length, H * DV, e, DV)
        out_tile = d_out_tile
        if SOFTMAX:
            out_tile = _tokens(out + (start * H + head) * DV, i, length, H * DV, e, DV)
        weights, gradients, _ = _gradients(
            q_tile, k_tile, v_tile, out_tile, d_out_tile, row, cell, i, j, length, own_normalisers,
            position, time, buckets, seed, width, reach, logit_scale, weight_scale, rate,
            H, SOFTMAX, HAS_POSITION, HAS_TIME, DROPOUT, PRECISION,
        )  # fmt: skip
        d_v_tile += tl.dot(tl.trans(weights.to(d_out_tile.dtype)), d_out_tile, input_precision=PRECISION)
        d_k_tile += tl.dot(tl.trans(gradients.to(q_tile.dtype)), q_tile, input_precision=PRECISION)
    tokens, real = (start + j[:, None]) * H + head, j[:, None] < length
    tl.store(d_k + tokens * DQK + d[None, :], d_k_tile * logit_scale, mask=real & (d[None, :] < DQK))
    tl.store(d_v + tokens * DV + e[None, :], d_v_tile, mask=real & (e[None, :] < DV))


@triton.jit
def sum_bias(
    d_logits, buckets, lengths, d_position, d_time, width,
    H: tl.constexpr, HAS_TIME: tl.constexpr, DIAGONALS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Sums of the logits' gradients over some queries and diagonals i - j of a row: by diagonal, and by time bucket.

    d_position: ``[B, query blocks, n]``, a number a diagonal. d_time: ``[B, query blocks, diagonal blocks, 129]``.
    """
    part, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    diagonals = part * DIAGONALS + tl.arange(0, DIAGONALS)
    by_diagonal = tl.zeros([DIAGONALS], dtype=tl.float32)
    by_bucket = tl.zeros([DIAGONALS, BUCKETS], dtype=tl.float32)
    beyond = tl.zeros([DIAGONALS], dtype=tl.float32)
    every_bucket = tl.arange(0, BUCKETS)
    first = tl.maximum(chunk * QUERIES, part * DIAGONALS)  # before that no query has such a diagonal
    for i in range(first, tl.minimum((chunk + 1) * QUERIES, length)):
        known = diagonals <= i
        place = i * width + i - diagonals
        value = tl.zeros([DIAGONALS], dtype=tl.float32)
        for head in tl.static_range(H):
            own = d_logits + (row.to(tl.int64) * H + head) * width * width
            value += tl.load(own + place, mask=known, other=0.0)
        by_diagonal += value
        if HAS_TIME:
            own = buckets + row.to(tl.int64) * width * width
            bucket = tl.load(own + place, mask=known, other=0).to(tl.int32)
            by_bucket += tl.where(bucket[:, None] == every_bucket[None, :], value[:, None], 0.0)
            beyond += tl.where(bucket == BUCKETS, value, 0.0)
    block = row * tl.num_programs(1) + chunk
    tl.store(d_position + block * width + diagonals, by_diagonal, mask=diagonals < width)
    if HAS_TIME:
        sums = d_time + (block * tl.num_programs(0) + part) * (BUCKETS + 1)
        tl.store(sums + every_bucket, tl.sum(by_bucket, axis=0))
        tl.store(sums + BUCKETS, tl.sum(beyond, axis=0))
