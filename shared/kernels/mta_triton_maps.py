"""The map operations of `shared.kernels.mta_chunked` in Triton, for every combination of kernels.

Head mixing is a product over heads for each (query, key): all heads' logits must meet before the softmax, and all
heads' normalisers be known before the second mixing. So each query's row is read twice, first for the log-sum-exp of
its mixed logits, then for the weights; backward reads it twice as well, as the softmax's row sums need the mixed
gradients of all heads. Weights go to the matrix library through one block of rows in memory at a time.

The key-query convolution is a product with a banded matrix for each lag, in tiles, on the tensor cores.
Nothing is summed by atomics: results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

LOG2_E = tl.constexpr(1.4426950408889634)
# A tile of the convolution; rows and lags that the gradient of its kernel takes at once.
CONV_COLUMNS, CONV_ROWS = 32, 128
CONV_GRAD_ROWS, CONV_GRAD_LAGS = 32, 4


@triton.jit
def _scores_kernel(
    Q, K, Hidden, X, R, C, hidden_stride, scale, H, G,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X = scale * q kᵀ in fp32, 0 where hidden. Hidden is (B or 1, 1, R, C)."""
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BLOCK_D)
    q_mask, k_mask = (rows[:, None] < R) & (d[None, :] < D), (cols[:, None] < C) & (d[None, :] < D)
    q = tl.load(Q + bh * R * D + rows[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    k = tl.load(K + (b * G + h // (H // G)) * C * D + cols[:, None] * D + d[None, :], mask=k_mask, other=0.0)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    mask = (rows[:, None] < R) & (cols[None, :] < C)
    place = rows.to(tl.int64)[:, None] * C + cols[None, :]
    hidden = tl.load(Hidden + b * hidden_stride + place, mask=mask, other=1)
    tl.store(X + bh * R * C + place, tl.where(hidden != 0, 0.0, x), mask=mask)


@triton.jit
def _mixed_logits(X, Hidden, pre, heads, cols, R, C, H, HAS_PRE: tl.constexpr, PRECISION: tl.constexpr):
    """(HP, BN) scores, and mixed logits in base 2, -inf where hidden, of one row, at which X and Hidden point."""
    x = tl.load(
        X + heads.to(tl.int64)[:, None] * R * C + cols[None, :],
        mask=(heads[:, None] < H) & (cols[None, :] < C),
        other=0.0,
    ).to(tl.float32)
    hidden = tl.load(Hidden + cols, mask=cols < C, other=1)
    logits = x
    if HAS_PRE:
        logits = tl.dot(pre, x, input_precision=PRECISION)
    return x, tl.where(hidden[None, :] != 0, float("-inf"), logits * LOG2_E)


@triton.jit
def _square(M, heads, H, TRANSPOSED: tl.constexpr):
    """(H, H) matrix, zero beyond H."""
    mask = (heads[:, None] < H) & (heads[None, :] < H)
    if TRANSPOSED:
        return tl.load(M + heads[None, :] * H + heads[:, None], mask=mask, other=0.0)
    return tl.load(M + heads[:, None] * H + heads[None, :], mask=mask, other=0.0)


@triton.jit
def _weights_kernel(
    X, Hidden, Pre, Post, LSE, Y, R, C, hidden_stride, H,
    HP: tl.constexpr, BN: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row, all heads: Y = Postᵀ softmax(Pre X), and LSE in base 2 (0 for a row without keys)."""
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0)
    heads = tl.arange(0, HP)
    x_ptr, hidden_ptr = X + b * H * R * C + r.to(tl.int64) * C, Hidden + b * hidden_stride + r.to(tl.int64) * C
    pre = _square(Pre, heads, H, False) if HAS_PRE else heads
    m = tl.full([HP], float("-inf"), dtype=tl.float32)
    l = tl.zeros([HP], dtype=tl.float32)
    for start in range(0, C, BN):
        cols = start + tl.arange(0, BN)
        _, logits = _mixed_logits(x_ptr, hidden_ptr, pre, heads, cols, R, C, H, HAS_PRE, PRECISION)
        m_new = tl.maximum(m, tl.max(logits, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp2(m - m_finite) + tl.sum(tl.exp2(logits - m_finite[:, None]), 1)
        m = m_new
    lse = tl.where(l == 0.0, 0.0, m + tl.log2(tl.where(l == 0.0, 1.0, l)))
    tl.store(LSE + (b * H + heads) * R + r, lse, mask=heads < H)

    post_t = _square(Post, heads, H, True) if HAS_POST else heads
    y_ptr = Y + b * H * R * C + r.to(tl.int64) * C
    for start in range(0, C, BN):
        cols = start + tl.arange(0, BN)
        _, logits = _mixed_logits(x_ptr, hidden_ptr, pre, heads, cols, R, C, H, HAS_PRE, PRECISION)
        y = tl.exp2(logits - lse[:, None])
        if HAS_POST:
            y = tl.dot(post_t, y, input_precision=PRECISION)
        mask = (heads[:, None] < H) & (cols[None, :] < C)
        tl.store(y_ptr + heads.to(tl.int64)[:, None] * R * C + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _weights_backward_kernel(
    X, Hidden, Pre, Post, LSE, dY, dX, dPre, dPost, R, C, hidden_stride, H,
    HP: tl.constexpr, BN: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row, all heads: dX, and the row's part of dPre and dPost, (B * R, H, H) each."""
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0)
    heads = tl.arange(0, HP)
    row = b * H * R * C + r.to(tl.int64) * C
    x_ptr, hidden_ptr = X + row, Hidden + b * hidden_stride + r.to(tl.int64) * C
    pre = _square(Pre, heads, H, False) if HAS_PRE else heads
    pre_t = _square(Pre, heads, H, True) if HAS_PRE else heads
    post = _square(Post, heads, H, False) if HAS_POST else heads
    lse = tl.load(LSE + (b * H + heads) * R + r, mask=heads < H, other=0.0)
    delta = tl.zeros([HP], dtype=tl.float32)
    for start in range(0, C, BN):
        cols = start + tl.arange(0, BN)
        place = heads.to(tl.int64)[:, None] * R * C + cols[None, :]
        mask = (heads[:, None] < H) & (cols[None, :] < C)
        _, logits = _mixed_logits(x_ptr, hidden_ptr, pre, heads, cols, R, C, H, HAS_PRE, PRECISION)
        dy = tl.load(dY + row + place, mask=mask, other=0.0).to(tl.float32)
        da = tl.dot(post, dy, input_precision=PRECISION) if HAS_POST else dy
        delta += tl.sum(tl.exp2(logits - lse[:, None]) * da, 1)

    d_pre = tl.zeros([HP, HP], dtype=tl.float32)
    d_post = tl.zeros([HP, HP], dtype=tl.float32)
    for start in range(0, C, BN):
        cols = start + tl.arange(0, BN)
        place = heads.to(tl.int64)[:, None] * R * C + cols[None, :]
        mask = (heads[:, None] < H) & (cols[None, :] < C)
        x, logits = _mixed_logits(x_ptr, hidden_ptr, pre, heads, cols, R, C, H, HAS_PRE, PRECISION)
        a = tl.exp2(logits - lse[:, None])
        dy = tl.load(dY + row + place, mask=mask, other=0.0).to(tl.float32)
        da = tl.dot(post, dy, input_precision=PRECISION) if HAS_POST else dy
        dx = a * (da - delta[:, None])
        if HAS_POST:
            d_post = tl.dot(a, tl.trans(dy), d_post, input_precision=PRECISION)
        if HAS_PRE:
            d_pre = tl.dot(dx, tl.trans(x), d_pre, input_precision=PRECISION)
            dx = tl.dot(pre_t, dx, input_precision=PRECISION)
        tl.store(dX + row + place, dx, mask=mask)
    place = (b * R + r) * H * H + heads[:, None] * H + heads[None, :]
    mask = (heads[:, None] < H) & (heads[None, :] < H)
    if HAS_PRE:
        tl.store(dPre + place, d_pre, mask=mask)
    if HAS_POST:
        tl.store(dPost + place, d_post, mask=mask)


@triton.jit
def _convolve_kernel(
    X, Dense, Hidden, Y, R_IN, R, C, shift, left, hidden_stride, H,
    A: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[r, c0 + n] = sum over a and m of X[r + shift - a, c0 - left + m] Dense[a, m, n], c0 a tile's first."""
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    c0 = tl.program_id(0) * BN
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    wide, narrow = tl.arange(0, KW), tl.arange(0, BN)
    in_cols, cols = c0 - left + wide, c0 + narrow
    in_cols_exist = (in_cols >= 0) & (in_cols < C)
    y = tl.zeros([BM, BN], dtype=tl.float32)
    for a in range(A):
        in_rows = rows + shift - a
        mask = ((in_rows >= 0) & (in_rows < R_IN))[:, None] & in_cols_exist[None, :]
        x = tl.load(X + bh * R_IN * C + in_rows.to(tl.int64)[:, None] * C + in_cols[None, :], mask=mask, other=0.0)
        dense = tl.load(Dense + (h * A + a) * KW * BN + wide[:, None] * BN + narrow[None, :])
        y = tl.dot(x, dense, y, input_precision=PRECISION)
    mask = (rows[:, None] < R) & (cols[None, :] < C)
    place = rows.to(tl.int64)[:, None] * C + cols[None, :]
    if HAS_HIDDEN:
        hidden = tl.load(Hidden + b * hidden_stride + place, mask=mask, other=1)
        y = tl.where(hidden != 0, 0.0, y)
    tl.store(Y + bh * R * C + place, y, mask=mask)


@triton.jit
def _convolve_weight_kernel(
    X, dY, dDense, R_IN, R, C, shift, left, n_tiles,
    AP: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dDense of AP lags, from every num_programs-th tile of columns: (B * H, groups of lags, programs, KW, AP * BN)."""
    bh = tl.program_id(2).to(tl.int64)
    wide = tl.arange(0, KW)
    lag, narrow = tl.program_id(1) * AP + tl.arange(0, AP * BN) // BN, tl.arange(0, AP * BN) % BN
    total = tl.zeros([KW, AP * BN], dtype=tl.float32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        in_cols, cols = tile * BN - left + wide, tile * BN + narrow
        in_cols_exist = (in_cols >= 0) & (in_cols < C)
        for start in range(0, R_IN, BM):
            in_rows = start + tl.arange(0, BM)
            mask = (in_rows < R_IN)[:, None] & in_cols_exist[None, :]
            x = tl.load(X + bh * R_IN * C + in_rows.to(tl.int64)[:, None] * C + in_cols[None, :], mask=mask, other=0.0)
            rows = in_rows[:, None] - shift + lag[None, :]
            dy_mask = (rows >= 0) & (rows < R) & (cols[None, :] < C)
            dy = tl.load(dY + bh * R * C + rows.to(tl.int64) * C + cols[None, :], mask=dy_mask, other=0.0)
            total = tl.dot(tl.trans(x), dy, total, input_precision=PRECISION)
    place = ((bh * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)) * KW * AP * BN
    tl.store(dDense + place + wide[:, None] * AP * BN + tl.arange(0, AP * BN)[None, :], total)


@triton.jit
def _mix_kernel(
    X, Mix, Y, N, H, HP: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Y = Mix X, or Mixᵀ X, for (B, H, N)."""
    heads, cols = tl.arange(0, HP), tl.program_id(0) * BN + tl.arange(0, BN)
    place = (tl.program_id(1).to(tl.int64) * H + heads)[:, None] * N + cols[None, :]
    mask = (heads[:, None] < H) & (cols[None, :] < N)
    x = tl.load(X + place, mask=mask, other=0.0)
    tl.store(Y + place, tl.dot(_square(Mix, heads, H, TRANSPOSED), x, input_precision=PRECISION), mask=mask)


@triton.jit
def _mix_weight_kernel(
    X, dY, dMix, N, H, HP: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dMix = X dYᵀ, from every num_programs-th tile of columns: (B, programs, H, H)."""
    b, heads = tl.program_id(1).to(tl.int64), tl.arange(0, HP)
    total = tl.zeros([HP, HP], dtype=tl.float32)
    for start in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
        cols = start + tl.arange(0, BN)
        place, mask = (b * H + heads)[:, None] * N + cols[None, :], (heads[:, None] < H) & (cols[None, :] < N)
        x, dy = tl.load(X + place, mask=mask, other=0.0), tl.load(dY + place, mask=mask, other=0.0)
        total = tl.dot(x, tl.trans(dy), total, input_precision=PRECISION)
    place = (b * tl.num_programs(0) + tl.program_id(0)) * H * H + heads[:, None] * H + heads[None, :]
    tl.store(dMix + place, total, mask=(heads[:, None] < H) & (heads[None, :] < H))


def _batch_stride(hidden_B1RC: torch.Tensor) -> int:
    return 0 if hidden_B1RC.shape[0] == 1 else hidden_B1RC.stride(0)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, scale, hidden, precision):
        ctx.save_for_backward(q, k, hidden)
        ctx.scale = scale
        (B, H, R, D), (G, C) = q.shape, k.shape[1:3]
        x = q.new_empty(B, H, R, C, dtype=torch.float32)
        block_d = max(16, triton.next_power_of_2(D))
        _scores_kernel[(triton.cdiv(C, 128), triton.cdiv(R, 64), B * H)](
            q, k, hidden, x, R, C, _batch_stride(hidden), scale, H, G,
            D=D, BLOCK_D=block_d, BM=64, BN=128, PRECISION=precision, num_warps=4,
        )  # fmt: skip
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        q, k, hidden = ctx.saved_tensors
        (B, _, _, D), (G, C) = q.shape, k.shape[1:3]
        dx = dx.to(q.dtype, copy=True).masked_fill_(hidden, 0).view(B, G, -1, C)
        dq = (dx @ k).view_as(q) * ctx.scale
        return dq, dx.transpose(-1, -2) @ q.view(B, G, -1, D) * ctx.scale, None, None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pre, post, hidden, dtype, precision):
        B, H, R, C = x.shape
        heads = max(16, triton.next_power_of_2(H))
        ctx.constants = {
            "HP": heads,
            "BN": max(16, 2048 // heads),
            "HAS_PRE": pre is not None,
            "HAS_POST": post is not None,
            "PRECISION": precision,
        }
        lse = x.new_empty(B, H, R)
        y = torch.empty_like(x, dtype=dtype)
        _weights_kernel[(R, B)](
            x, hidden, x if pre is None else pre, x if post is None else post, lse, y, R, C, _batch_stride(hidden), H,
            **ctx.constants,
        )  # fmt: skip
        ctx.save_for_backward(x, pre, post, hidden, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, pre, post, hidden, lse = ctx.saved_tensors
        B, H, R, C = x.shape
        dx = torch.empty_like(x)
        d_pre, d_post = (None if mix is None else x.new_empty(B * R, H, H) for mix in (pre, post))
        _weights_backward_kernel[(R, B)](
            x, hidden, x if pre is None else pre, x if post is None else post, lse, dy.contiguous(), dx,
            x if pre is None else d_pre, x if post is None else d_post, R, C, _batch_stride(hidden), H,
            **ctx.constants,
        )  # fmt: skip
        return dx, None if pre is None else d_pre.sum(0), None if post is None else d_post.sum(0), None, None, None


def _margin(width: int) -> int:
    """Columns that a tile reads on each side, rounded up for wide loads."""
    return max(16, -(-(width // 2) // 16) * 16)


def _taps(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(width, CONV_COLUMNS) indices m, n of the entries of the banded matrix that hold each tap."""
    n = torch.arange(CONV_COLUMNS, device=device).expand(width, -1)
    return n + torch.arange(width, device=device)[:, None] + _margin(width) - width // 2, n


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, rows_above, hidden, precision):
        ctx.save_for_backward(x, kernel, hidden)
        ctx.rows_above, ctx.precision = rows_above, precision
        shift = kernel.shape[1] - 1 - rows_above
        return _Convolve.run(x, kernel, x.shape[2] - shift, shift, hidden, precision)

    @staticmethod
    def run(x, kernel, n_rows, shift, hidden, precision):
        """Rows r + shift - a of x, weighed by the kernel's lag a, make row r."""
        B, H, R_in, C = x.shape
        n_lags, width = kernel.shape[1:]
        left = _margin(width)
        dense = kernel.new_zeros(H, n_lags, triton.next_power_of_2(CONV_COLUMNS + 2 * left), CONV_COLUMNS)
        m, n = _taps(width, x.device)
        dense[:, :, m, n] = kernel.flip(1)[..., None]
        y = x.new_empty(B, H, n_rows, C)
        _convolve_kernel[(triton.cdiv(C, CONV_COLUMNS), triton.cdiv(n_rows, CONV_ROWS), B * H)](
            x, dense, x if hidden is None else hidden, y, R_in, n_rows, C, shift, left,
            0 if hidden is None else _batch_stride(hidden), H,
            A=n_lags, KW=dense.shape[2], BM=CONV_ROWS, BN=CONV_COLUMNS, HAS_HIDDEN=hidden is not None,
            PRECISION=precision, num_stages=2,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, kernel, hidden = ctx.saved_tensors
        (B, H, R_in, C), (n_lags, width) = x.shape, kernel.shape[1:]
        dy = dy.contiguous() if hidden is None else dy.masked_fill(hidden, 0)
        # Row i of x has met row i + a - shift of y: the same convolution with the kernel turned round.
        dx = _Convolve.run(dy, kernel.flip(1, 2), R_in, ctx.rows_above, None, ctx.precision)
        reach, left = CONV_COLUMNS + 2 * _margin(width), _margin(width)
        n_tiles = triton.cdiv(C, CONV_COLUMNS)
        group = min(CONV_GRAD_LAGS, triton.next_power_of_2(n_lags))
        n_groups, n_parts = triton.cdiv(n_lags, group), min(16, n_tiles)
        parts = x.new_empty(B, H, n_groups, n_parts, triton.next_power_of_2(reach), group * CONV_COLUMNS)
        _convolve_weight_kernel[(n_parts, n_groups, B * H)](
            x, dy, parts, R_in, dy.shape[2], C, n_lags - 1 - ctx.rows_above, left, n_tiles,
            AP=group, KW=parts.shape[4], BM=CONV_GRAD_ROWS, BN=CONV_COLUMNS, PRECISION=ctx.precision, num_stages=2,
        )  # fmt: skip
        d_dense = parts.sum((0, 3)).unflatten(-1, (group, CONV_COLUMNS)).transpose(2, 3).flatten(1, 2)[:, :n_lags]
        m, n = _taps(width, x.device)
        return dx, d_dense[:, :, m, n].sum(-1).flip(1), None, None, None


class _Mix(torch.autograd.Function):
    """y_m = sum over h of mix[h, m] x_h."""

    @staticmethod
    def forward(ctx, x, mix, precision):
        ctx.save_for_backward(x, mix)
        ctx.precision = precision
        return _Mix.run(x, mix, True, precision)

    @staticmethod
    def run(x, mix, transposed, precision):
        B, H, R, C = x.shape
        heads = max(16, triton.next_power_of_2(H))
        y, columns = torch.empty_like(x), max(16, 4096 // heads)
        _mix_kernel[(triton.cdiv(R * C, columns), B)](
            x, mix, y, R * C, H, HP=heads, BN=columns, TRANSPOSED=transposed, PRECISION=precision
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mix = ctx.saved_tensors
        (B, H, R, C), dy = x.shape, dy.contiguous()
        heads = max(16, triton.next_power_of_2(H))
        columns = max(16, 4096 // heads)
        parts = x.new_empty(B, min(1024, triton.cdiv(R * C, columns)), H, H)
        _mix_weight_kernel[(parts.shape[1], B)](x, dy, parts, R * C, H, HP=heads, BN=columns, PRECISION=ctx.precision)
        return _Mix.run(dy, mix, False, ctx.precision), parts.sum((0, 1)), None


class TritonMaps:
    """Stands in for `shared.kernels.mta_chunked.TorchMaps`, for inputs of `dtype`; maps are fp32."""

    def __init__(self, dtype: torch.dtype):
        # Of products within maps: tf32 has 3 bits more than bf16; where the inputs are fp32, three tf32 products.
        one_product = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
        self.precision = "tf32" if one_product else "tf32x3"

    def scores(self, q_bHRD, k_bGCD, scale, hidden_b1RC):
        return _Scores.apply(q_bHRD.contiguous(), k_bGCD.contiguous(), scale, hidden_b1RC.contiguous(), self.precision)

    def convolve(self, x_bHRC, kernel_HAO, rows_above, hidden_b1RC=None):
        hidden_b1RC = None if hidden_b1RC is None else hidden_b1RC.contiguous()
        return _Convolve.apply(x_bHRC, kernel_HAO.contiguous(), rows_above, hidden_b1RC, self.precision)

    def weights(self, x_bHRC, head_pre, head_post, hidden_b1RC, padding_b1R1, dtype):
        if head_post is not None:
            head_post = torch.block_diag(*head_post)
        pre = None if head_pre is None else head_pre.contiguous()
        return _Weights.apply(x_bHRC, pre, head_post, hidden_b1RC.contiguous(), dtype, self.precision)

    def mix(self, x_bHRC, head_post):
        return _Mix.apply(x_bHRC.contiguous(), torch.block_diag(*head_post), self.precision)
