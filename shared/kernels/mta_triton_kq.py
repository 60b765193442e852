"""Multi-Token Attention with key-query kernels and no head mixing, in linear memory (Triton).

Far from the diagonal the convolution factorises over the lags (see `shared.kernels.mta_band`), and attention is flash
attention with c_q products for each tile of logits: expanded keys (S, c_q, D) before the softmax, expanded values
(S, c_q, D) after it. The few keys next to the diagonal are computed exactly as a band. Both share one softmax: the
band's log-sum-exp enters each row of the far part as the start of its running sum.

Two kernels do the work that is quadratic in T:
- forward: running softmax over tiles of far logits;
- maps: the weights P, and in backward also dS, of a panel of the map, for the matrix library to multiply. A panel has a
  fixed number of elements, so memory stays linear in T. Kernels that kept the c_q accumulators of dK or dQ on chip
  would have to compute the logits twice or more. Nothing is summed by atomics: results are the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from shared.kernels.mta_band import (
    add_lags,
    band_apply,
    band_dot,
    convolve_band,
    expand_lags,
    near_keys,
    same_segment,
    shift_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# Elements of a panel, over batch and heads; its length is a multiple of the step.
PANEL_ELEMENTS = 2**26
PANEL_STEP = 128


@triton.jit
def _logits(
    q_ptr, k_ptr, rows, cols, first_row, T, S,
    CQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sum over a of q[row - a] · K_a[col], (BM, BN) fp32; a query before the row's first_row is zero."""
    d = tl.arange(0, BLOCK_D)
    s = tl.zeros([BM, BN], dtype=tl.float32)
    for a in range(CQ):
        past = rows - a
        q_mask = ((past >= first_row) & (rows < T))[:, None] & (d[None, :] < D)
        q = tl.load(q_ptr + past[:, None] * D + d[None, :], mask=q_mask, other=0.0)
        k_mask = (cols[:, None] < S) & (d[None, :] < D)
        k = tl.load(k_ptr + (cols[:, None] * CQ + a) * D + d[None, :], mask=k_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    return s


@triton.jit
def _forward_kernel(
    Q, K, V, Sink, First, O, LSE, T, S, W, scale, H, K_HEADS, V_HEADS,
    CQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head: softmax over the sink and the keys from First to W before the row.

    LSE, and with HAS_V also O.
    """
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows = row_block * BM + tl.arange(0, BM)
    d = tl.arange(0, BLOCK_D)
    q_ptr = Q + bh * T * D
    k_ptr = K + (b * K_HEADS + h // (H // K_HEADS)) * S * CQ * D
    v_ptr = V + (b * V_HEADS + h // (H // V_HEADS)) * S * D
    first = tl.load(First + b * T + rows, mask=rows < T, other=S)
    first_row = tl.maximum(first - (S - T), 0)

    m = tl.load(Sink + bh * T + rows, mask=rows < T, other=float("-inf")) * LOG2_E
    l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BM, BLOCK_D], dtype=tl.float32)
    oldest = tl.min(first, 0) // BN * BN
    newest = tl.minimum(T, row_block * BM + BM) - 1 + S - T - W
    for start in range(oldest, newest + 1, BN):
        cols = start + tl.arange(0, BN)
        if HAS_V:
            # Asked for before the products of the logits, which hide the wait.
            v_mask = (cols[:, None] < S) & (d[None, :] < D)
            v = tl.load(v_ptr + cols[:, None] * D + d[None, :], mask=v_mask, other=0.0)
        s = _logits(q_ptr, k_ptr, rows, cols, first_row, T, S, CQ, D, BLOCK_D, BM, BN, PRECISION)
        visible = (cols[None, :] >= first[:, None]) & (cols[None, :] <= rows[:, None] + (S - T - W))
        s = tl.where(visible, s * (scale * LOG2_E), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_finite[:, None])
        alpha = tl.exp2(m - m_finite)
        l = l * alpha + tl.sum(p, 1)
        if HAS_V:
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    l_or_1 = tl.where(l == 0.0, 1.0, l)
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l_or_1)) / LOG2_E)
    tl.store(LSE + bh * T + rows, lse, mask=rows < T)
    if HAS_V:
        o = (acc / l_or_1[:, None]).to(O.dtype.element_ty)
        tl.store(O + bh * T * D + rows[:, None] * D + d[None, :], o, mask=(rows[:, None] < T) & (d[None, :] < D))


@triton.jit
def _maps_kernel(
    Q, K, V, LSE, dO, Delta, First, P, dS, T, S, W, scale, row0, n_rows, col0, n_cols, width, H, K_HEADS, V_HEADS,
    CQ: tl.constexpr, CV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the panel of rows row0.. and columns col0..: P, and in backward dS; zero at keys that are not far.

    V and dO have CV vectors of D for each key and query. Panels are (B, H, n_rows, width), width >= n_cols.
    """
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    panel_rows = tl.program_id(1) * BM + tl.arange(0, BM)
    panel_cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, cols = row0 + panel_rows, col0 + panel_cols
    out = bh * n_rows * width + panel_rows.to(tl.int64)[:, None] * width + panel_cols[None, :]
    out_mask = (panel_rows[:, None] < n_rows) & (panel_cols[None, :] < n_cols)
    first = tl.load(First + b * T + rows, mask=rows < T, other=S)
    newest = tl.minimum(T, row0 + tl.program_id(1) * BM + BM) - 1 + S - T - W
    start = col0 + tl.program_id(0) * BN
    if (start > newest) | (start + BN <= tl.min(first, 0)):
        zero = tl.zeros([BM, BN], dtype=P.dtype.element_ty)
        tl.store(P + out, zero, mask=out_mask)
        if BACKWARD:
            tl.store(dS + out, zero, mask=out_mask)
    else:
        q_ptr = Q + bh * T * D
        k_ptr = K + (b * K_HEADS + h // (H // K_HEADS)) * S * CQ * D
        first_row = tl.maximum(first - (S - T), 0)
        s = _logits(q_ptr, k_ptr, rows, cols, first_row, T, S, CQ, D, BLOCK_D, BM, BN, PRECISION)
        visible = (cols[None, :] >= first[:, None]) & (cols[None, :] <= rows[:, None] + (S - T - W))
        lse = tl.load(LSE + bh * T + rows, mask=rows < T, other=0.0)
        p = tl.where(visible, tl.exp2(s * (scale * LOG2_E) - lse[:, None] * LOG2_E), 0.0)
        tl.store(P + out, p.to(P.dtype.element_ty), mask=out_mask)
        if BACKWARD:
            d = tl.arange(0, BLOCK_D)
            do_ptr = dO + bh * T * CV * D
            v_ptr = V + (b * V_HEADS + h // (H // V_HEADS)) * S * CV * D
            dp = tl.zeros([BM, BN], dtype=tl.float32)
            for c in range(CV):
                do_mask, v_mask = (rows[:, None] < T) & (d[None, :] < D), (cols[:, None] < S) & (d[None, :] < D)
                do = tl.load(do_ptr + (rows[:, None] * CV + c) * D + d[None, :], mask=do_mask, other=0.0)
                v = tl.load(v_ptr + (cols[:, None] * CV + c) * D + d[None, :], mask=v_mask, other=0.0)
                dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
            delta = tl.load(Delta + bh * T + rows, mask=rows < T, other=0.0)
            ds = p * (dp - delta[:, None]) * scale
            tl.store(dS + out, ds.to(dS.dtype.element_ty), mask=out_mask)


@triton.jit
def _fold_lags_kernel(
    G, dQ, First, T, S, row0, H,
    CQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dQ[r] += sum over a of G[r + a, a], where G begins at row row0 and r is not before the first row of r + a."""
    bh = tl.program_id(1).to(tl.int64)
    rows = tl.maximum(row0 - (CQ - 1), 0) + tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < T) & (d[None, :] < D)
    dq_ptr = dQ + bh * T * D + rows[:, None] * D + d[None, :]
    g_ptr = G + bh * (T - row0) * CQ * D
    dq = tl.load(dq_ptr, mask=mask, other=0.0)
    for a in tl.static_range(CQ):
        later = rows + a
        exists = (later >= row0) & (later < T)
        exists &= tl.load(First + bh // H * T + later, mask=exists, other=S) - (S - T) <= rows
        g = tl.load(g_ptr + ((later[:, None] - row0) * CQ + a) * D + d[None, :], mask=exists[:, None] & mask, other=0.0)
        dq += g.to(tl.float32)
    tl.store(dq_ptr, dq, mask=mask)


def tiles(dtype: torch.dtype, block_d: int, device: torch.device) -> dict[str, int]:
    """The largest tiles that fit on chip; fixed rather than timed at run time, as sums depend on their order.

    The sizes spill no registers on sm_90, short of fp32 heads wider than 64 (a few hundred bytes).
    """
    size = dtype.itemsize
    if size == 4:
        choices = [(64, 64, 4, 2)] if block_d <= 64 else []
        choices += [(64, 32, 4, 2), (32, 32, 4, 1)]
    else:
        choices = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)]
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    # Each stage holds tiles of q and k; the values of the running tile come beside them.
    bm, bn, warps, stages = next(
        (c for c in choices if (c[3] * (c[0] + c[1]) + c[1]) * block_d * size <= shared), choices[-1]
    )
    return {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}


def precision(dtype: torch.dtype) -> str:
    """Of products in a kernel: fp32 by three tf32 products, unless the user lets torch use one."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@dataclass(frozen=True)
class _Far:
    """Launches the kernels for one call's tensors, in the shapes that `_FarAttention` takes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    first_BT: torch.Tensor
    W: int
    scale: float

    def _constants(self) -> dict:
        D = self.q.shape[-1]
        block_d = max(16, triton.next_power_of_2(D))  # 16: the smallest product
        return {
            "CQ": self.k.shape[3],
            "D": D,
            "BLOCK_D": block_d,
            "PRECISION": precision(self.q.dtype),
            **tiles(self.q.dtype, block_d, self.q.device),
        }

    def columns_visible(self, row: int) -> int:
        """Number of keys at least W before the row."""
        return max(0, row + self.k.shape[2] - self.q.shape[2] - self.W + 1)

    def forward(self, sink: torch.Tensor, o: torch.Tensor | None, lse: torch.Tensor) -> None:
        """Fills lse, and o unless None."""
        B, H, T, _ = self.q.shape
        constants = self._constants()
        _forward_kernel[(triton.cdiv(T, constants["BM"]), B * H)](
            self.q, self.k, self.v, sink, self.first_BT, self.q if o is None else o, lse,
            T, self.k.shape[2], self.W, self.scale, H, self.k.shape[1], self.v.shape[1],
            HAS_V=o is not None, **constants,
        )  # fmt: skip

    def maps(self, lse, rows: tuple[int, int], cols: tuple[int, int], do=None, delta=None):
        """P, and dS where do (B, H, T, CV, D) is given, for ranges of rows and columns: (B, H, rows, >= cols)."""
        B, H, T, _ = self.q.shape
        n_rows, n_cols = rows[1] - rows[0], cols[1] - cols[0]
        width = -(-n_cols // 16) * 16  # the matrix library wants aligned rows
        p = self.q.new_empty(B, H, n_rows, width)
        ds = None if do is None else torch.empty_like(p)
        constants = self._constants()
        _maps_kernel[(triton.cdiv(n_cols, constants["BN"]), triton.cdiv(n_rows, constants["BM"]), B * H)](
            self.q, self.k, self.v, lse, self.q if do is None else do, lse if do is None else delta, self.first_BT,
            p, p if do is None else ds, T, self.k.shape[2], self.W, self.scale, rows[0], n_rows, cols[0], n_cols, width,
            H, self.k.shape[1], self.v.shape[1], CV=self.v.shape[3], BACKWARD=do is not None, **constants,
        )  # fmt: skip
        return p, ds

    def fold_lags(self, g: torch.Tensor, dq: torch.Tensor, row0: int) -> None:
        """dq[r] += sum over a of g[r + a, a]; g (B, H, T - row0, CQ, D) begins at row0."""
        B, H, T, D = self.q.shape
        n_lags = self.k.shape[3]
        n_rows = T - max(0, row0 - (n_lags - 1))
        _fold_lags_kernel[(triton.cdiv(n_rows, 32), B * H)](
            g, dq, self.first_BT, T, self.k.shape[2], row0, H,
            CQ=n_lags, D=D, BLOCK_D=triton.next_power_of_2(D), BM=32,
        )  # fmt: skip


def _multiply_panel(panel_BHRC: torch.Tensor, x_BGCD: torch.Tensor) -> torch.Tensor:
    """panel @ x for each head, x's heads shared by H / G heads of the panel; columns beyond x's are left out."""
    (B, H, R, C), (G, n_cols) = panel_BHRC.shape, x_BGCD.shape[1:3]
    return (panel_BHRC.view(B, G, -1, C)[..., :n_cols] @ x_BGCD).view(B, H, R, -1)


def _multiply_panel_transposed(panel_BHRC: torch.Tensor, x_BHRD: torch.Tensor, G: int, n_cols: int) -> torch.Tensor:
    """panelᵀ @ x, summed over the heads that share one of G: (B, G, n_cols, D)."""
    (B, _, _, C), D = panel_BHRC.shape, x_BHRD.shape[-1]
    return panel_BHRC.view(B, G, -1, C)[..., :n_cols].transpose(-1, -2) @ x_BHRD.reshape(B, G, -1, D)


def _ranges(n: int, step: int) -> list[tuple[int, int]]:
    """[start, end) over 0..n, in multiples of PANEL_STEP."""
    step = max(PANEL_STEP, step // PANEL_STEP * PANEL_STEP)
    return [(start, min(n, start + step)) for start in range(0, n, step)]


class _FarAttention(torch.autograd.Function):
    """Softmax attention over a sink logit of each row and the keys at least W positions before it.

    Args:
        q, k, v: (B, H, T, D), (B, KH, S, CQ, D), (B, VH, S, CV, D); the logit is the sum over a of q[i - a] · k[j, a].
        sink: (B, H, T) fp32, -inf for none.
        first_BT: of `first_keys`.
        same_BTA: of `same_segment` for CQ lags.

    Returns:
        o (B, H, T, CV, D), to which the sink adds nothing, and the log-sum-exp of each row with its sink (B, H, T),
        -inf in empty rows.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, first_BT, same_BTA, W, scale):
        B, H, T, D = q.shape
        CV = v.shape[3]
        far = _Far(q, k, v, first_BT, W, scale)
        o, lse = q.new_empty(B, H, T, CV, D), q.new_empty(B, H, T, dtype=torch.float32)
        far.forward(sink, o if CV == 1 else None, lse)
        if CV > 1:
            for rows in _ranges(T, PANEL_ELEMENTS // (B * H * k.shape[2])):
                n_cols = far.columns_visible(rows[1] - 1)
                if n_cols == 0:
                    o[:, :, slice(*rows)] = 0
                    continue
                p, _ = far.maps(lse, rows, (0, n_cols))
                o[:, :, slice(*rows)] = _multiply_panel(p, v[:, :, :n_cols].flatten(3)).unflatten(-1, (CV, D))
        ctx.save_for_backward(q, k, v, sink, first_BT, same_BTA, o, lse)
        ctx.W, ctx.scale = W, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, sink, first_BT, same_BTA, o, lse = ctx.saved_tensors
        far = _Far(q, k, v, first_BT, ctx.W, ctx.scale)
        (B, H, T, D), (KH, S, CQ), (VH, _, CV) = q.shape, k.shape[1:4], v.shape[1:4]
        do = do.contiguous()
        delta = -dlse
        for c in range(CV):
            delta = delta + (do[:, :, :, c].float() * o[:, :, :, c].float()).sum(-1)
        past_q = shift_rows(q, CQ, same_BTA).flatten(3)
        dq = torch.zeros_like(q, dtype=torch.float32)
        # Keys that are far from no query are in no panel.
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for cols in _ranges(far.columns_visible(T - 1), PANEL_ELEMENTS // (B * H * T)):
            here, n_cols = slice(*cols), cols[1] - cols[0]
            row0 = max(0, cols[0] + ctx.W - (S - T))
            p, ds = far.maps(lse, (row0, T), cols, do, delta)
            dv[:, :, here] = _multiply_panel_transposed(p, do[:, :, row0:].flatten(3), VH, n_cols).unflatten(3, (CV, D))
            del p
            dk[:, :, here] = _multiply_panel_transposed(ds, past_q[:, :, row0:], KH, n_cols).unflatten(3, (CQ, D))
            g = _multiply_panel(ds, k[:, :, here].flatten(3))
            if CQ == 1:
                dq[:, :, row0:] += g
            else:
                far.fold_lags(g, dq, row0)
        # An empty row has no sink either: -inf - -inf.
        dsink = -delta * torch.exp(sink - lse.masked_fill(lse == -torch.inf, 0))
        return dq.to(q.dtype), dk, dv, dsink, None, None, None, None


def first_keys(segment_BS: torch.Tensor | None, q_BHTD: torch.Tensor, n_keys: int) -> torch.Tensor:
    """(B, T) int32, the first position of each query's segment; n_keys for padding, which sees no key."""
    B, _, T, _ = q_BHTD.shape
    if segment_BS is None:
        return torch.zeros(B, T, dtype=torch.int32, device=q_BHTD.device)
    starts_BS = F.pad(segment_BS.diff(dim=1) != 0, (1, 0)) * torch.arange(n_keys, device=q_BHTD.device)
    first_BS = starts_BS.cummax(1).values.masked_fill(segment_BS < 0, n_keys)
    return first_BS[:, n_keys - T :].to(torch.int32).contiguous()


def mta_triton_kq(q_BHTD, k_BGSD, v_BGSD, *, kq_pre, kq_post, segment_ids, scale) -> torch.Tensor:
    """See `shared.kernels.mta.mta_attention`; D <= 128, values as wide as keys."""
    (_, H, T, _), (_, G, S, _) = q_BHTD.shape, k_BGSD.shape
    q_BHTD, k_BGSD, v_BGSD = q_BHTD.contiguous(), k_BGSD.contiguous(), v_BGSD.contiguous()
    k_BHSD, v_BHSD = k_BGSD.repeat_interleave(H // G, dim=1), v_BGSD.repeat_interleave(H // G, dim=1)
    pre_lags, pre_reach = (kq_pre.shape[1], kq_pre.shape[2] // 2) if kq_pre is not None else (1, 0)
    post_lags, post_reach = (kq_post.shape[1], kq_post.shape[2] // 2) if kq_post is not None else (1, 0)
    W = max(1, pre_lags - 1 + pre_reach, post_reach)
    same_pre_BTA, same_post_BTA = (same_segment(segment_ids, T, lags) for lags in (pre_lags, post_lags))

    # Logits of the W newest keys of each query.
    near_B1Tn = near_keys(segment_ids, T, S, W + pre_reach, q_BHTD.device)
    band_BHTn = (band_dot(q_BHTD, k_BHSD, W + pre_reach) * scale).masked_fill(~near_B1Tn, 0)
    if kq_pre is not None:
        band_BHTn = convolve_band(band_BHTn, kq_pre, W, same_pre_BTA)
    band_BHTn = band_BHTn.masked_fill(~near_B1Tn[..., :W], -torch.inf)

    expanded_k = k_BGSD.unsqueeze(3) if kq_pre is None else expand_lags(k_BGSD, kq_pre, segment_ids)
    expanded_v = v_BGSD.unsqueeze(3) if kq_post is None else expand_lags(v_BGSD, kq_post.flip(2), segment_ids)
    sink_BHT = band_BHTn.logsumexp(-1)
    first_BT = first_keys(segment_ids, q_BHTD, S)
    far_BHTAD, lse_BHT = _FarAttention.apply(q_BHTD, expanded_k, expanded_v, sink_BHT, first_BT, same_pre_BTA, W, scale)

    # Rows of padding have no key at all.
    band_BHTn = torch.exp(band_BHTn - lse_BHT.masked_fill(lse_BHT == -torch.inf, 0)[..., None])
    if kq_post is None:
        far_BHTD = far_BHTAD.squeeze(3)
    else:
        far_BHTD = add_lags(far_BHTAD, same_post_BTA)
        n_out = post_lags - 1 + W + post_reach
        band_BHTn = convolve_band(band_BHTn, kq_post, n_out, same_post_BTA)
        if segment_ids is not None:
            band_BHTn = band_BHTn * near_keys(segment_ids, T, S, n_out, q_BHTD.device)
    return (far_BHTD + band_apply(band_BHTn, v_BHSD)).to(q_BHTD.dtype)
