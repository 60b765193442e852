"""Multi-Token Attention with head mixing and no key-query kernels, in linear memory (Triton).

Head mixing is a product over heads for each (query, key): all heads' logits must meet before the softmax, and all
heads' normalisers be known before the second mixing. So one program takes one query's row of all heads, and reads it
twice: for the log-sum-exp of its mixed logits, then for the weights; in backward for the softmax's row sums, then for
the gradients. Scores, weights and their gradients exist for a panel of rows at a time, which the matrix library
multiplies. A panel has a fixed number of elements, so memory stays linear in T. Nothing is summed by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from shared.kernels.mta_triton_band import block_of, first_keys, precision

LOG2_E = tl.constexpr(1.4426950408889634)
# Elements of a panel, over batch and heads; its rows are a multiple of the step.
PANEL_ELEMENTS = 2**27
PANEL_STEP = 64
# Elements of a tile of all heads.
TILE = 2048


@triton.jit
def _scores_kernel(
    Q, K, X, T, S, row0, R, C, scale, H, G,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X = scale * q kᵀ of a panel (B, H, R, C) of rows row0..; left as it is where no key of a tile is visible."""
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    rows, cols = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN <= row0 + tl.program_id(1) * BM + BM - 1 + S - T:
        d = tl.arange(0, BLOCK_D)
        q_mask, k_mask = (rows[:, None] < R) & (d[None, :] < D), (cols[:, None] < C) & (d[None, :] < D)
        q = tl.load(Q + (bh * T + row0 + rows)[:, None] * D + d[None, :], mask=q_mask, other=0.0)
        k = tl.load(K + ((b * G + h // (H // G)) * S + cols)[:, None] * D + d[None, :], mask=k_mask, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if X.dtype.element_ty == tl.float16:
            x = tl.clamp(x, -65504.0, 65504.0)
        x_ptr = X + (bh * R + rows)[:, None] * C + cols[None, :]
        tl.store(x_ptr, x.to(X.dtype.element_ty), mask=(rows[:, None] < R) & (cols[None, :] < C))


@triton.jit
def _square(M, heads, H, TRANSPOSED: tl.constexpr):
    """(H, H) matrix, zero beyond H."""
    mask = (heads[:, None] < H) & (heads[None, :] < H)
    if TRANSPOSED:
        return tl.load(M + heads[None, :] * H + heads[:, None], mask=mask, other=0.0)
    return tl.load(M + heads[:, None] * H + heads[None, :], mask=mask, other=0.0)


@triton.jit
def _mixed_logits(
    x_ptr, pre, heads, cols, R, C, H, first, last, HAS_PRE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(HP, BN) scores of the row at x_ptr, and its mixed logits in base 2, -inf outside of keys first..last."""
    visible = (cols >= first) & (cols <= last)
    mask = (heads[:, None] < H) & visible[None, :]
    x = tl.load(x_ptr + heads.to(tl.int64)[:, None] * R * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    logits = x
    if HAS_PRE:
        logits = tl.dot(pre, x, input_precision=PRECISION)
    return x, tl.where(visible[None, :], logits * LOG2_E, float("-inf"))


@triton.jit
def _weights_kernel(
    X, First, Pre, Post, LSE, Y, T, S, row0, R, C, H,
    HP: tl.constexpr, BN: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row, all heads: Y = Postᵀ softmax(Pre X), and LSE in base 2 (0 for a row without keys)."""
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0)
    heads = tl.arange(0, HP)
    row = b * H * R * C + r.to(tl.int64) * C
    first, last = tl.load(First + b * T + row0 + r), row0 + r + S - T
    pre = _square(Pre, heads, H, False) if HAS_PRE else heads
    m = tl.full([HP], float("-inf"), dtype=tl.float32)
    l = tl.zeros([HP], dtype=tl.float32)
    for start in range(first // BN * BN, last + 1, BN):
        cols = start + tl.arange(0, BN)
        _, logits = _mixed_logits(X + row, pre, heads, cols, R, C, H, first, last, HAS_PRE, PRECISION)
        m_new = tl.maximum(m, tl.max(logits, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp2(m - m_finite) + tl.sum(tl.exp2(logits - m_finite[:, None]), 1)
        m = m_new
    lse = tl.where(l == 0.0, 0.0, m + tl.log2(tl.where(l == 0.0, 1.0, l)))
    tl.store(LSE + (b * H + heads) * T + row0 + r, lse, mask=heads < H)

    post_t = _square(Post, heads, H, True) if HAS_POST else heads
    for start in range(0, C, BN):
        cols = start + tl.arange(0, BN)
        _, logits = _mixed_logits(X + row, pre, heads, cols, R, C, H, first, last, HAS_PRE, PRECISION)
        y = tl.exp2(logits - lse[:, None])
        if HAS_POST:
            y = tl.dot(post_t, y, input_precision=PRECISION)
        y_ptr = Y + row + heads.to(tl.int64)[:, None] * R * C + cols[None, :]
        tl.store(y_ptr, y.to(Y.dtype.element_ty), mask=(heads[:, None] < H) & (cols[None, :] < C))


@triton.jit
def _weights_backward_kernel(
    X, First, Pre, Post, LSE, dY, Y, dPre, dPost, T, S, row0, R, C, H,
    HP: tl.constexpr, BN: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row, all heads: Y again; dY becomes dX; and the row's part of dPre and dPost, (B * R, H, H) each.

    Y may share X's memory.
    """
    b, r = tl.program_id(1).to(tl.int64), tl.program_id(0)
    heads = tl.arange(0, HP)
    row = b * H * R * C + r.to(tl.int64) * C
    first, last = tl.load(First + b * T + row0 + r), row0 + r + S - T
    pre = _square(Pre, heads, H, False) if HAS_PRE else heads
    pre_t = _square(Pre, heads, H, True) if HAS_PRE else heads
    post = _square(Post, heads, H, False) if HAS_POST else heads
    post_t = _square(Post, heads, H, True) if HAS_POST else heads
    lse = tl.load(LSE + (b * H + heads) * T + row0 + r, mask=heads < H, other=0.0)
    delta = tl.zeros([HP], dtype=tl.float32)
    for start in range(first // BN * BN, last + 1, BN):
        cols = start + tl.arange(0, BN)
        place, mask = heads.to(tl.int64)[:, None] * R * C + cols[None, :], (heads[:, None] < H) & (cols[None, :] < C)
        _, logits = _mixed_logits(X + row, pre, heads, cols, R, C, H, first, last, HAS_PRE, PRECISION)
        dy = tl.load(dY + row + place, mask=mask, other=0.0).to(tl.float32)
        da = tl.dot(post, dy, input_precision=PRECISION) if HAS_POST else dy
        delta += tl.sum(tl.exp2(logits - lse[:, None]) * da, 1)

    d_pre = tl.zeros([HP, HP], dtype=tl.float32)
    d_post = tl.zeros([HP, HP], dtype=tl.float32)
    for start in range(0, C, BN):
        cols = start + tl.arange(0, BN)
        place, mask = heads.to(tl.int64)[:, None] * R * C + cols[None, :], (heads[:, None] < H) & (cols[None, :] < C)
        x, logits = _mixed_logits(X + row, pre, heads, cols, R, C, H, first, last, HAS_PRE, PRECISION)
        a = tl.exp2(logits - lse[:, None])
        dy = tl.load(dY + row + place, mask=mask, other=0.0).to(tl.float32)
        da = tl.dot(post, dy, input_precision=PRECISION) if HAS_POST else dy
        dx = a * (da - delta[:, None])
        y = a
        if HAS_POST:
            y = tl.dot(post_t, a, input_precision=PRECISION)
            d_post = tl.dot(a, tl.trans(dy), d_post, input_precision=PRECISION)
        if HAS_PRE:
            d_pre = tl.dot(dx, tl.trans(x), d_pre, input_precision=PRECISION)
            dx = tl.dot(pre_t, dx, input_precision=PRECISION)
        tl.store(Y + row + place, y.to(Y.dtype.element_ty), mask=mask)
        tl.store(dY + row + place, dx.to(dY.dtype.element_ty), mask=mask)
    place = (b * R + r) * H * H + heads[:, None] * H + heads[None, :]
    mask = (heads[:, None] < H) & (heads[None, :] < H)
    if HAS_PRE:
        tl.store(dPre + place, d_pre, mask=mask)
    if HAS_POST:
        tl.store(dPost + place, d_post, mask=mask)


class _Panels:
    """Panels of rows of one call's maps, and the kernels that fill them."""

    def __init__(self, q, k, pre, post, first_BT, scale):
        self.q, self.k, self.pre, self.post, self.first_BT, self.scale = q, k, pre, post, first_BT, scale
        heads = block_of(q.shape[1])
        # Of products over heads: tf32 has 3 bits more than bf16; where the inputs are fp32, three tf32 products.
        self.precision = precision(q.dtype) if q.dtype == torch.float32 else "tf32"
        self.constants = {
            "HP": heads,
            "BN": max(16, TILE // heads),
            "HAS_PRE": pre is not None,
            "HAS_POST": post is not None,
            "PRECISION": self.precision,
            "num_warps": 2 if heads == 16 and q.dtype != torch.float32 else 4,
            "num_stages": 2,
        }

    def __iter__(self):
        """Ranges of rows, and the number of columns that they see, rounded up for the matrix library."""
        (B, H, T, _), S = self.q.shape, self.k.shape[2]
        step = max(PANEL_STEP, PANEL_ELEMENTS // (B * H * S) // PANEL_STEP * PANEL_STEP)
        for start in range(0, T, step):
            end = min(T, start + step)
            yield (start, end), min(S, -(-(end + S - T) // PANEL_STEP) * PANEL_STEP)

    def scores(self, rows: tuple[int, int], C: int) -> torch.Tensor:
        """(B, H, rows, C), undefined at keys that a row cannot see. fp16 has the precision of tf32 products."""
        (B, H, T, D), (G, S) = self.q.shape, self.k.shape[1:3]
        R = rows[1] - rows[0]
        x = self.q.new_empty(B, H, R, C, dtype=torch.float32 if self.q.dtype == torch.float32 else torch.float16)
        _scores_kernel[(triton.cdiv(C, 128), triton.cdiv(R, 64), B * H)](
            self.q, self.k, x, T, S, rows[0], R, C, self.scale, H, G,
            D=D, BLOCK_D=block_of(D), BM=64, BN=128, PRECISION=self.precision, num_warps=4,
        )  # fmt: skip
        return x

    def _place(self, x: torch.Tensor, row0: int) -> tuple:
        T, S = self.q.shape[2], self.k.shape[2]
        return T, S, row0, *x.shape[2:], x.shape[1]

    def weights(self, x: torch.Tensor, row0: int, lse: torch.Tensor) -> torch.Tensor:
        """Mixed weights of the scores x, in their memory; fills lse (B, H, T)."""
        y = x.view(self.q.dtype)
        pre, post = (lse if mix is None else mix for mix in (self.pre, self.post))
        _weights_kernel[(x.shape[2], x.shape[0])](
            x, self.first_BT, pre, post, lse, y, *self._place(x, row0), **self.constants
        )
        return y

    def gradients(self, x: torch.Tensor, row0: int, lse: torch.Tensor, dy: torch.Tensor):
        """Weights in the memory of x; gradients of scores in that of dy; of the mixings, None without one."""
        y, (B, H, R, _) = x.view(self.q.dtype), x.shape
        parts = [None if mix is None else lse.new_empty(B * R, H, H) for mix in (self.pre, self.post)]
        _weights_backward_kernel[(R, B)](
            x, self.first_BT, *(lse if mix is None else mix for mix in (self.pre, self.post)), lse, dy, y,
            *(lse if part is None else part for part in parts), *self._place(x, row0), **self.constants,
        )  # fmt: skip
        return y, dy, *(None if part is None else part.sum(0) for part in parts)


def _grouped(x_BHRC: torch.Tensor, G: int) -> torch.Tensor:
    """(B * G, H / G * R, C): the rows of all heads that share one of G."""
    B, _, _, C = x_BHRC.shape
    return x_BHRC.reshape(B * G, -1, C)


class _HeadMixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pre, post, first_BT, scale):
        (B, H, T, _), (G, _, Dv) = q.shape, v.shape[1:]
        panels = _Panels(q, k, pre, post, first_BT, scale)
        o, lse = q.new_empty(B, H, T, Dv), q.new_empty(B, H, T, dtype=torch.float32)
        for rows, C in panels:
            y = panels.weights(panels.scores(rows, C), rows[0], lse)
            o[:, :, slice(*rows)] = (_grouped(y, G) @ v[:, :, :C].flatten(0, 1)).view(B, H, -1, Dv)
        ctx.save_for_backward(q, k, v, pre, post, first_BT, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, pre, post, first_BT, lse = ctx.saved_tensors
        (B, H, _, D), G = q.shape, k.shape[1]
        panels = _Panels(q, k, pre, post, first_BT, ctx.scale)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32).flatten(0, 1) for x in (k, v))
        d_pre, d_post = (None if mix is None else torch.zeros_like(mix) for mix in (pre, post))
        for rows, C in panels:
            q_rows, do_rows = (_grouped(x[:, :, slice(*rows)], G) for x in (q, do))
            keys, values = (x[:, :, :C].flatten(0, 1) for x in (k, v))
            dy = (do_rows @ values.transpose(1, 2)).view(B, H, -1, C)
            y, dx, *d_mixes = panels.gradients(panels.scores(rows, C), rows[0], lse, dy)
            dv[:, :C] += _grouped(y, G).transpose(1, 2) @ do_rows
            dx = _grouped(dx, G)
            torch.mul((dx @ keys).view(B, H, -1, D), ctx.scale, out=dq[:, :, slice(*rows)])
            dk[:, :C] += dx.transpose(1, 2) @ q_rows
            for total, part in zip((d_pre, d_post), d_mixes, strict=True):
                if total is not None:
                    total += part
        return dq, (dk * ctx.scale).to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v), d_pre, d_post, None, None


def mta_triton_heads(q_BHTD, k_BGSD, v_BGSD, *, head_pre, head_post, segment_ids, scale) -> torch.Tensor:
    """See `shared.kernels.mta.mta_attention`; D <= 128."""
    pre = None if head_pre is None else head_pre.float().contiguous()
    post = None if head_post is None else torch.block_diag(*head_post.float())
    first_BT = first_keys(segment_ids, q_BHTD, k_BGSD.shape[2])
    qkv = (x.contiguous() for x in (q_BHTD, k_BGSD, v_BGSD))
    return _HeadMixing.apply(*qkv, pre, post, first_BT, scale)
