"""Linear-time parts of Multi-Token Attention with key-query kernels (Triton): lags, and the band next to the diagonal.

Next to the diagonal the convolution of Eq. 5 meets the causal mask, and its two factorisations over the lags a,

    before the softmax  L[i, j] = sum over a of q_{i-a} · K_a[j]           K_a[j] = sum over o of κ[a, o] k_{j+o}
    after it            O_i     = sum over a, m of A[i-a, m] V_a[m]        V_a[m] = sum over o of κ²[a, o] v_{m-o}

fail, as the sums over o would take in keys later than the query. They hold for keys j <= i - (c_q - 1) - (c_k - 1) / 2
and m <= i - (c_k - 1) / 2. The entries nearer than that are computed exactly, as a band: entry [r, t] of a band, (B, H,
T, n) in fp32, belongs to query r and to the key t positions before it. Queries are the last T of S positions.

first_BT is the position of the first key of each query's segment, S for padding (`first_keys`); a lag never leads out
of the segment. Gradients are summed without atomics.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# Rows or keys of a block, and the parts in which the gradients of learned kernels are summed.
ROWS, WEIGHT_ROWS, PARTS = 64, 32, 16


@triton.jit
def _in_segment(First, b, rows, lag, T, S, SIGN: tl.constexpr):
    """Whether row + SIGN * lag exists and the later of the two rows has the other in its segment."""
    later, earlier = rows, rows - lag
    if SIGN > 0:
        later, earlier = rows + lag, rows
    exists = (later < T) & (earlier >= 0)
    return exists & (tl.load(First + b * T + later, mask=exists, other=S) - (S - T) <= earlier)


@triton.jit
def _spread_kernel(
    X, First, Y, T, S, H,
    SIGN: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Y[r, a] = X[r + SIGN * a]."""
    bh = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < T) & (d[None, :] < D)
    for a in range(A):
        ok = _in_segment(First, bh // H, rows, a, T, S, SIGN)
        x = tl.load(X + (bh * T + rows + SIGN * a)[:, None] * D + d[None, :], mask=ok[:, None] & mask, other=0.0)
        tl.store(Y + ((bh * T + rows)[:, None] * A + a) * D + d[None, :], x, mask=mask)


@triton.jit
def _fold_kernel(
    X, First, Y, T, S, row0, H,
    SIGN: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Y[r] = or += sum over a of X[r + SIGN * a, a], where X begins at row row0."""
    bh = tl.program_id(1).to(tl.int64)
    rows, d = tl.maximum(row0 - (A - 1), 0) + tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < T) & (d[None, :] < D)
    y_ptr = Y + (bh * T + rows)[:, None] * D + d[None, :]
    y = tl.load(y_ptr, mask=mask, other=0.0).to(tl.float32) if ADD else tl.zeros([BM, BLOCK_D], dtype=tl.float32)
    for a in tl.static_range(A):
        other = rows + SIGN * a
        ok = _in_segment(First, bh // H, rows, a, T, S, SIGN) & (other >= row0)
        x_ptr = X + ((bh * (T - row0) + other - row0)[:, None] * A + a) * D + d[None, :]
        y += tl.load(x_ptr, mask=ok[:, None] & mask, other=0.0).to(tl.float32)
    tl.store(y_ptr, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _window(
    Tap, Segment, start, S, width, REVERSED: tl.constexpr, SEGMENTS: tl.constexpr, BM: tl.constexpr, KW: tl.constexpr
):  # fmt: skip
    """Keys of a block from `start` on, the KW keys around them, and the (BM, KW) taps of the second for the first.

    Entry [n, m] has tap m - n; REVERSED, the tap of the first for the second, width - 1 - (m - n).
    """
    keys, others = start + tl.arange(0, BM), start - width // 2 + tl.arange(0, KW)
    tap = tl.arange(0, KW)[None, :] - tl.arange(0, BM)[:, None]
    ok = (tap >= 0) & (tap < width)
    if REVERSED:
        tap = width - 1 - tap
    taps = tl.load(Tap + tap, mask=ok, other=0.0)
    if SEGMENTS:
        segment = tl.load(Segment + keys, mask=keys < S, other=-1)
        other_segment = tl.load(Segment + others, mask=(others >= 0) & (others < S), other=-1)
        taps = tl.where(segment[:, None] == other_segment[None, :], taps, 0.0)
    return keys, others, taps


@triton.jit
def _fine_dot(taps, x, acc, PRECISION: tl.constexpr):
    """acc + taps x with fp32's taps: where x is shorter, they are the sum of two of its type."""
    if x.dtype == tl.float32:
        acc = tl.dot(taps, x, acc, input_precision=PRECISION)
    else:
        high = taps.to(x.dtype)
        acc = tl.dot(high, x, acc)
        acc = tl.dot((taps - high.to(tl.float32)).to(x.dtype), x, acc)
    return acc


@triton.jit
def _expand_kernel(
    X, Kernel, Segment, Y, S, H, G, width,
    SEGMENTS: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    KW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[j, a] = sum over o of Kernel[a, o] X[j + o - width // 2] within j's segment."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    start, d = tl.program_id(0) * BM, tl.arange(0, BLOCK_D)
    for a in range(A):
        tap_ptr = Kernel + (h * A + a) * width
        keys, others, taps = _window(tap_ptr, Segment + b * S, start, S, width, False, SEGMENTS, BM, KW)
        x_mask = (others[:, None] >= 0) & (others[:, None] < S) & (d[None, :] < D)
        x_ptr = X + ((b * G + h // (H // G)) * S + others)[:, None] * D + d[None, :]
        x = tl.load(x_ptr, mask=x_mask, other=0.0)
        y = _fine_dot(taps, x, tl.zeros([BM, BLOCK_D], dtype=tl.float32), PRECISION)
        y_ptr = Y + ((bh * S + keys)[:, None] * A + a) * D + d[None, :]
        tl.store(y_ptr, y.to(Y.dtype.element_ty), mask=(keys[:, None] < S) & (d[None, :] < D))


@triton.jit
def _expand_backward_kernel(
    dY, Kernel, Segment, dX, S, H, G, width,
    SEGMENTS: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    KW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX[j] = sum over a, o, and the heads that share it, of Kernel[a, o] dY[j - (o - width // 2), a]."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    start, d = tl.program_id(0) * BM, tl.arange(0, BLOCK_D)
    dx = tl.zeros([BM, BLOCK_D], dtype=tl.float32)
    for lag in range(H // G * A):
        h, a = g * (H // G) + lag // A, lag % A
        tap_ptr = Kernel + (h * A + a) * width
        _, others, taps = _window(tap_ptr, Segment + b * S, start, S, width, True, SEGMENTS, BM, KW)
        dy_ptr = dY + (((b * H + h) * S + others)[:, None] * A + a) * D + d[None, :]
        dy = tl.load(dy_ptr, mask=(others[:, None] >= 0) & (others[:, None] < S) & (d[None, :] < D), other=0.0)
        dx = _fine_dot(taps, dy, dx, PRECISION)
    keys = start + tl.arange(0, BM)
    mask = (keys[:, None] < S) & (d[None, :] < D)
    tl.store(dX + (bg * S + keys)[:, None] * D + d[None, :], dx.to(dX.dtype.element_ty), mask=mask)


@triton.jit
def _expand_weight_kernel(
    X, dY, Segment, Out, S, H, G, width,
    SEGMENTS: tl.constexpr, A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    KW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out[n, m] = sum over blocks j0 of dY[j0 + n, a] · X[j0 - width // 2 + m] within a segment; one lag, one part."""
    bh, a = tl.program_id(2).to(tl.int64), tl.program_id(1)
    b, h = bh // H, bh % H
    d = tl.arange(0, BLOCK_D)
    x_ptr = X + (b * G + h // (H // G)) * S * D
    total = tl.zeros([BM, KW], dtype=tl.float32)
    for start in range(tl.program_id(0) * BM, S, tl.num_programs(0) * BM):
        keys, others = start + tl.arange(0, BM), start - width // 2 + tl.arange(0, KW)
        exists = (others >= 0) & (others < S)
        dy_ptr = dY + ((bh * S + keys)[:, None] * A + a) * D + d[None, :]
        dy = tl.load(dy_ptr, mask=(keys[:, None] < S) & (d[None, :] < D), other=0.0)
        x = tl.load(x_ptr + others[:, None] * D + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)
        product = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
        if SEGMENTS:
            segment = tl.load(Segment + b * S + keys, mask=keys < S, other=-1)
            other_segment = tl.load(Segment + b * S + others, mask=exists, other=-1)
            product = tl.where(segment[:, None] == other_segment[None, :], product, 0.0)
        total += product
    place = ((bh * A + a) * tl.num_programs(0) + tl.program_id(0)) * BM * KW
    tl.store(Out + place + tl.arange(0, BM)[:, None] * KW + tl.arange(0, KW)[None, :], total)


@triton.jit
def _band_dot_kernel(
    Q, K, Y, T, S, H, G, n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[r, t] = q_r · k of t positions before r, zero before the first key."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    k_ptr = K + (b * G + h // (H // G)) * S * D
    q_mask = (rows[:, None] < T) & (d[None, :] < D)
    q = tl.load(Q + (bh * T + rows)[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    end = tl.program_id(0) * BM + BM + S - T
    for start in range(end - tl.cdiv(BM + n - 1, BM) * BM, end, BM):
        keys = start + tl.arange(0, BM)
        k_mask = (keys[:, None] >= 0) & (keys[:, None] < S) & (d[None, :] < D)
        k = tl.load(k_ptr + keys[:, None] * D + d[None, :], mask=k_mask, other=0.0)
        back = rows[:, None] + (S - T) - keys[None, :]
        y = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        tl.store(Y + (bh * T + rows)[:, None] * n + back, y, mask=(rows[:, None] < T) & (back >= 0) & (back < n))


@triton.jit
def _band_apply_kernel(
    Band, V, Base, Y, T, S, H, G, n,
    HAS_BASE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[r] = Base[r] + sum over t of Band[r, t] times v of t positions before r."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    v_ptr = V + (b * G + h // (H // G)) * S * D
    place, mask = (bh * T + rows)[:, None] * D + d[None, :], (rows[:, None] < T) & (d[None, :] < D)
    y = tl.zeros([BM, BLOCK_D], dtype=tl.float32)
    if HAS_BASE:
        y = tl.load(Base + place, mask=mask, other=0.0).to(tl.float32)
    end = tl.program_id(0) * BM + BM + S - T
    for start in range(end - tl.cdiv(BM + n - 1, BM) * BM, end, BM):
        keys = start + tl.arange(0, BM)
        v_mask = (keys[:, None] >= 0) & (keys[:, None] < S) & (d[None, :] < D)
        v = tl.load(v_ptr + keys[:, None] * D + d[None, :], mask=v_mask, other=0.0)
        back = rows[:, None] + (S - T) - keys[None, :]
        band_mask = (rows[:, None] < T) & (back >= 0) & (back < n)
        band = tl.load(Band + (bh * T + rows)[:, None] * n + back, mask=band_mask, other=0.0)
        y = tl.dot(band.to(v.dtype), v, y, input_precision=PRECISION)
    tl.store(Y + place, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _band_apply_transposed_kernel(
    Band, X, Y, T, S, H, G, n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[j] = sum over t, and the heads that share it, of Band[j + t, t] times x of the query at position j + t."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    keys, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    first_row = tl.program_id(0) * BM - (S - T)
    y = tl.zeros([BM, BLOCK_D], dtype=tl.float32)
    for shared in range(H // G):
        bh = b * H + g * (H // G) + shared
        for start in range(first_row, first_row + BM + n - 1, BM):
            rows = start + tl.arange(0, BM)
            exists = (rows >= 0) & (rows < T)
            x_mask = exists[:, None] & (d[None, :] < D)
            x = tl.load(X + (bh * T + rows)[:, None] * D + d[None, :], mask=x_mask, other=0.0)
            back = rows[None, :] + (S - T) - keys[:, None]
            band_mask = exists[None, :] & (back >= 0) & (back < n)
            band = tl.load(Band + (bh * T + rows)[None, :] * n + back, mask=band_mask, other=0.0)
            y = tl.dot(band.to(x.dtype), x, y, input_precision=PRECISION)
    mask = (keys[:, None] < S) & (d[None, :] < D)
    tl.store(Y + (bg * S + keys)[:, None] * D + d[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _convolve_band_kernel(
    X, Mix, First, Y, T, S, H, n_in, n_out, stride_in, stride_out,
    SIGN: tl.constexpr, A: tl.constexpr, NI: tl.constexpr, NO: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Y[r] = sum over a of X[r + SIGN * a] Mix[a], where Mix is (n_in, n_out) with the strides given."""
    bh = tl.program_id(1).to(tl.int64)
    rows, i, o = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, NI), tl.arange(0, NO)
    mix_mask = (i[:, None] < n_in) & (o[None, :] < n_out)
    y = tl.zeros([BM, NO], dtype=tl.float32)
    for a in range(A):
        ok = _in_segment(First, bh // H, rows, a, T, S, SIGN)
        x_ptr = X + (bh * T + rows + SIGN * a)[:, None] * n_in + i[None, :]
        x = tl.load(x_ptr, mask=ok[:, None] & (i[None, :] < n_in), other=0.0)
        mix_ptr = Mix + ((bh % H) * A + a) * n_in * n_out + i[:, None] * stride_in + o[None, :] * stride_out
        y = tl.dot(x, tl.load(mix_ptr, mask=mix_mask, other=0.0), y, input_precision="tf32x3")
    y_mask = (rows[:, None] < T) & (o[None, :] < n_out)
    tl.store(Y + (bh * T + rows)[:, None] * n_out + o[None, :], y, mask=y_mask)


@triton.jit
def _convolve_band_weight_kernel(
    X, dY, First, Out, T, S, H, n_in, n_out,
    A: tl.constexpr, NI: tl.constexpr, NO: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Out = sum over rows of X[r - a]ᵀ dY[r]; one lag, one part."""
    bh, a = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i, o = tl.arange(0, NI), tl.arange(0, NO)
    total = tl.zeros([NI, NO], dtype=tl.float32)
    for start in range(tl.program_id(0) * BM, T, tl.num_programs(0) * BM):
        rows = start + tl.arange(0, BM)
        ok = _in_segment(First, bh // H, rows, a, T, S, -1)
        x_mask, dy_mask = ok[:, None] & (i[None, :] < n_in), (rows[:, None] < T) & (o[None, :] < n_out)
        x = tl.load(X + (bh * T + rows - a)[:, None] * n_in + i[None, :], mask=x_mask, other=0.0)
        dy = tl.load(dY + (bh * T + rows)[:, None] * n_out + o[None, :], mask=dy_mask, other=0.0)
        total = tl.dot(tl.trans(x), dy, total, input_precision="tf32x3")
    place = ((bh * A + a) * tl.num_programs(0) + tl.program_id(0)) * NI * NO
    tl.store(Out + place + i[:, None] * NO + o[None, :], total)


def precision(dtype: torch.dtype) -> str:
    """Of products in a kernel: fp32 by three tf32 products, unless the user lets torch use one."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def block_of(n: int) -> int:
    """The power of 2 that holds n, at least the 16 that products need."""
    return max(16, triton.next_power_of_2(n))


def spread_lags(x_BHTD: torch.Tensor, n_lags: int, first_BT: torch.Tensor, n_keys: int, sign: int) -> torch.Tensor:
    """(B, H, T, n_lags, D): [r, a] is row r + sign * a, zero where that is no row of the same segment."""
    B, H, T, D = x_BHTD.shape
    y = x_BHTD.new_empty(B, H, T, n_lags, D)
    _spread_kernel[(triton.cdiv(T, ROWS), B * H)](
        x_BHTD, first_BT, y, T, n_keys, H, SIGN=sign, A=n_lags, D=D, BLOCK_D=block_of(D), BM=ROWS
    )
    return y


def fold_lags(x_BHRAD: torch.Tensor, y_BHTD: torch.Tensor, first_BT, n_keys: int, sign: int, add: bool) -> None:
    """y[r] = or += sum over a of x[r + sign * a, a], where x has the last R of T rows; the adjoint of `spread_lags`."""
    (B, H, T, D), (R, n_lags) = y_BHTD.shape, x_BHRAD.shape[2:4]
    _fold_kernel[(triton.cdiv(T - max(0, T - R - (n_lags - 1)), 32), B * H)](
        x_BHRAD, first_BT, y_BHTD, T, n_keys, T - R, H,
        SIGN=sign, A=n_lags, D=D, BLOCK_D=block_of(D), BM=32, ADD=add,
    )  # fmt: skip


class _AddLags(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first_BT, n_keys):
        B, H, T, ctx.n_lags, D = x.shape
        ctx.save_for_backward(first_BT)
        ctx.n_keys = n_keys
        y = x.new_empty(B, H, T, D)
        fold_lags(x, y, first_BT, n_keys, -1, add=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (first_BT,) = ctx.saved_tensors
        return spread_lags(dy.contiguous(), ctx.n_lags, first_BT, ctx.n_keys, 1), None, None


class _ExpandLags(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, segments):
        (B, G, S, D), (H, n_lags, width) = x.shape, kernel.shape
        by_lag = kernel.float().flip(1).contiguous()
        ctx.save_for_backward(x, by_lag, segments)
        ctx.kernel_dtype = kernel.dtype
        ctx.constants = {"SEGMENTS": segments is not None, "A": n_lags, "D": D, "BLOCK_D": block_of(D)}
        # Several windows of fp32 values would not fit on chip.
        rows, stages = (min(32, ROWS), 1) if x.dtype == torch.float32 else (ROWS, 2)
        ctx.constants |= {"PRECISION": precision(x.dtype), "num_stages": stages}
        ctx.block = {"BM": rows, "KW": block_of(rows + width - 1)}
        y = x.new_empty(B, H, S, n_lags, D)
        _expand_kernel[(triton.cdiv(S, rows), B * H)](
            x, by_lag, by_lag if segments is None else segments, y, S, H, G, width, **ctx.block, **ctx.constants
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, by_lag, segments = ctx.saved_tensors
        (B, G, S, _), (H, n_lags, width) = x.shape, by_lag.shape
        dy, dx, segments = dy.contiguous(), torch.empty_like(x), by_lag if segments is None else segments
        _expand_backward_kernel[(triton.cdiv(S, ctx.block["BM"]), B * G)](
            dy, by_lag, segments, dx, S, H, G, width, **ctx.block, **ctx.constants
        )
        rows = max(WEIGHT_ROWS, block_of(width) // 2)
        reach = block_of(rows + width - 1)
        parts = by_lag.new_empty(B, H, n_lags, min(PARTS, triton.cdiv(S, rows)), rows, reach)
        _expand_weight_kernel[(parts.shape[3], n_lags, B * H)](
            x, dy, segments, parts, S, H, G, width, BM=rows, KW=reach, **ctx.constants
        )
        # Tap o is where column m is o after row n.
        total = parts.sum((0, 3))
        diagonals = total.as_strided((H, n_lags, rows, width), (*total.stride()[:2], reach + 1, 1))
        return dx, diagonals.sum(2).flip(1).to(ctx.kernel_dtype), None


def _band_options(x: torch.Tensor) -> dict:
    D = x.shape[-1]
    return {"D": D, "BLOCK_D": block_of(D), "BM": ROWS, "PRECISION": precision(x.dtype)}


def _dot(q: torch.Tensor, k: torch.Tensor, n: int) -> torch.Tensor:
    (B, H, T, _), (G, S) = q.shape, k.shape[1:3]
    y = q.new_empty(B, H, T, n, dtype=torch.float32)
    _band_dot_kernel[(triton.cdiv(T, ROWS), B * H)](q, k, y, T, S, H, G, n, **_band_options(q))
    return y


def _apply(band: torch.Tensor, v: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    (B, H, T, n), (G, S, D) = band.shape, v.shape[1:]
    y = v.new_empty(B, H, T, D)
    _band_apply_kernel[(triton.cdiv(T, ROWS), B * H)](
        band, v, y if base is None else base, y, T, S, H, G, n, HAS_BASE=base is not None, **_band_options(v)
    )
    return y


def _apply_transposed(band: torch.Tensor, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    (B, H, T, n), (G, S) = band.shape, like.shape[1:3]
    y = torch.empty_like(like)
    _band_apply_transposed_kernel[(triton.cdiv(S, ROWS), B * G)](band, x, y, T, S, H, G, n, **_band_options(x))
    return y


class _BandDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, n):
        ctx.save_for_backward(q, k)
        return _dot(q, k, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (q, k), dy = ctx.saved_tensors, dy.contiguous()
        return _apply(dy, k, None), _apply_transposed(dy, q, k), None


class _BandApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, band, v, base):
        ctx.save_for_backward(band, v)
        ctx.base_dtype = base.dtype
        return _apply(band, v, base)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (band, v), dy = ctx.saved_tensors, dy.contiguous()
        return _dot(dy, v, band.shape[-1]), _apply_transposed(band, dy, v), dy.to(ctx.base_dtype)


class _ConvolveBand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mix, first_BT, n_keys):
        ctx.save_for_backward(x, mix, first_BT)
        ctx.n_keys = n_keys
        return _ConvolveBand.run(x, mix, first_BT, n_keys, -1)

    @staticmethod
    def run(x, mix, first_BT, n_keys, sign):
        """Rows r + sign * a of x through mix[a]; for sign = 1 through its transpose."""
        (B, H, T, n_in), (n_lags, n_rows, n_columns) = x.shape, mix.shape[1:]
        n_out, strides = (n_columns, (n_columns, 1)) if sign < 0 else (n_rows, (1, n_columns))
        y = x.new_empty(B, H, T, n_out)
        _convolve_band_kernel[(triton.cdiv(T, ROWS), B * H)](
            x, mix, first_BT, y, T, n_keys, H, n_in, n_out, *strides,
            SIGN=sign, A=n_lags, NI=block_of(n_in), NO=block_of(n_out), BM=ROWS,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mix, first_BT = ctx.saved_tensors
        (B, H, T, n_in), (n_lags, _, n_out) = x.shape, mix.shape[1:]
        dy = dy.contiguous()
        dx = _ConvolveBand.run(dy, mix, first_BT, ctx.n_keys, 1)
        parts = x.new_empty(B, H, n_lags, min(PARTS, triton.cdiv(T, ROWS)), block_of(n_in), block_of(n_out))
        _convolve_band_weight_kernel[(parts.shape[3], n_lags, B * H)](
            x, dy, first_BT, parts, T, ctx.n_keys, H, n_in, n_out,
            A=n_lags, NI=parts.shape[4], NO=parts.shape[5], BM=ROWS,
        )  # fmt: skip
        return dx, parts.sum((0, 3))[:, :, :n_in, :n_out], None, None


def first_keys(segment_BS: torch.Tensor | None, q_BHTD: torch.Tensor, n_keys: int) -> torch.Tensor:
    """(B, T) int32, the first position of each query's segment; n_keys for padding, which sees no key."""
    B, _, T, _ = q_BHTD.shape
    if segment_BS is None:
        return torch.zeros(B, T, dtype=torch.int32, device=q_BHTD.device)
    starts_BS = F.pad(segment_BS.diff(dim=1) != 0, (1, 0)) * torch.arange(n_keys, device=q_BHTD.device)
    first_BS = starts_BS.cummax(1).values.masked_fill(segment_BS < 0, n_keys)
    return first_BS[:, n_keys - T :].to(torch.int32).contiguous()


def near_keys(first_BT: torch.Tensor, n_keys: int, n: int) -> torch.Tensor:
    """(B, 1, T, n): whether query r may see the key t before it, which exists and is in its segment."""
    T = first_BT.shape[1]
    position_T = torch.arange(n_keys - T, n_keys, device=first_BT.device)
    return (torch.arange(n, device=first_BT.device) <= (position_T - first_BT)[..., None])[:, None]


def band_dot(q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, n: int) -> torch.Tensor:
    """(B, H, T, n) fp32: [r, t] = q_r · k of t positions before r, zero before the first key."""
    return _BandDot.apply(q_BHTD, k_BGSD, n)


def band_apply(band_BHTn: torch.Tensor, v_BGSD: torch.Tensor, base_BHTD: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) in v's dtype: base_r + the sum over t of band[r, t] times v of t positions before r."""
    return _BandApply.apply(band_BHTn.contiguous(), v_BGSD, base_BHTD.contiguous())


def add_lags(x_BHTAD: torch.Tensor, first_BT: torch.Tensor, n_keys: int) -> torch.Tensor:
    """(B, H, T, D): y[r] = sum over a of x[r - a, a] within the segment."""
    return _AddLags.apply(x_BHTAD, first_BT, n_keys)


@functools.lru_cache(maxsize=16)
def _taps(n_lags: int, width: int, n: int, n_out: int, device: torch.device) -> torch.Tensor:
    """(n_lags, width, n, n_out): 1 where the tap leads from one entry of a band to the other, else 0."""
    lag_A111, tap_w11, back_n1, out_m = (torch.arange(size, device=device) for size in (n_lags, width, n, n_out))
    lag_A111, tap_w11, back_n1 = lag_A111[:, None, None, None], tap_w11[:, None, None], back_n1[:, None]
    return (tap_w11 == out_m - lag_A111 - back_n1 + width // 2).float()


def convolve_band(
    x_BHTn: torch.Tensor, kernel_HAO: torch.Tensor, n_out: int, first_BT: torch.Tensor, n_keys: int
) -> torch.Tensor:
    """Eq. 5 on a band: y[i, t'] = sum over a, t of kernel[a, o] x[i - a, t] with o = t' - a - t, for t' < n_out.

    Nothing outside the band x is seen; row i - a only within row i's segment.
    """
    _, n_lags, width = kernel_HAO.shape
    is_tap_Awnm = _taps(n_lags, width, x_BHTn.shape[-1], n_out, x_BHTn.device)
    mix_HAnm = torch.einsum("haw,awnm->hanm", kernel_HAO.float().flip(1), is_tap_Awnm)
    return _ConvolveBand.apply(x_BHTn.contiguous(), mix_HAnm.contiguous(), first_BT, n_keys)


def expand_lags(x_BGSD: torch.Tensor, kernel_HAO: torch.Tensor, segment_BS: torch.Tensor | None) -> torch.Tensor:
    """(B, H, S, c_q, D) in x's dtype: y[j, a] = sum over o of kernel[a, o] x_{j+o} within j's segment.

    The K_a of the module's docstring; V_a with the kernel flipped in o. Computed in fp32: a learned kernel is close to
    the identity and would lose its difference from it in a shorter type.
    """
    return _ExpandLags.apply(x_BGSD, kernel_HAO, segment_BS)
