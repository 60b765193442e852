"""Multi-Token Attention with key-query kernels and no head mixing, in linear memory (Triton).

Far from the diagonal the convolution factorises over the lags (see `shared.kernels.mta_triton_band`), and attention is
flash attention with c_q products for each tile of logits: expanded keys (S, c_q, D) before the softmax, expanded values
(S, c_q, D) after it. The few keys next to the diagonal are computed exactly as a band. Both share one softmax: the
band's log-sum-exp enters each row of the far part as the start of its running sum.

Three kernels do the work that is quadratic in T, on tiles that descriptors load (on Hopper its copy engine):
- forward: running softmax over tiles of far logits;
- weights: the weights P of a panel of the map;
- score gradients: dS of a panel from its P, in place.
The matrix library multiplies panels. A panel has a fixed number of elements, so memory stays linear in T. Kernels that
kept the c_q accumulators of dK or dQ on chip would have to compute the logits twice or more. Nothing is summed by
atomics: results are the same in every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from shared.kernels.mta_triton_band import (
    add_lags,
    band_apply,
    band_dot,
    block_of,
    convolve_band,
    expand_lags,
    first_keys,
    fold_lags,
    near_keys,
    precision,
    spread_lags,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# Elements of a panel, over batch and heads; its length is a multiple of the step.
PANEL_ELEMENTS = 2**27
PANEL_STEP = 128


@triton.jit
def _logits(
    Q, K, q_row, k_row, rows, first_row,
    SEGMENTS: tl.constexpr, CQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum over a of q[row - a] · K_a[col], (BM, BN) fp32, from rows q_row of Q and k_row of K on.

    Q has zeros above each head's first row. With segments, a query before the row's first_row counts as zero.
    """
    s = tl.zeros([BM, BN], dtype=tl.float32)
    # Where D is no multiple of BK, a slice of K_a ends in K_{a+1}: the one of Q is zero there.
    for slice in range(CQ * (BLOCK_D // BK)):
        a, x = slice // (BLOCK_D // BK), slice % (BLOCK_D // BK) * BK
        q = Q.load([q_row - a, x])
        k = K.load([k_row, a * D + x])
        if SEGMENTS:
            q = tl.where((rows - a >= first_row)[:, None], q, 0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    return s


@triton.jit
def _forward_kernel(
    Q, K, V, Sink, First, O, LSE, T, S, W, scale, H, K_HEADS, V_HEADS,
    HAS_V: tl.constexpr, SEGMENTS: tl.constexpr, CQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head: softmax over the sink and the keys from First to W before the row.

    LSE, and with HAS_V also O.
    """
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    rows = row_block * BM + tl.arange(0, BM)
    q_row = bh * (T + CQ - 1) + CQ - 1 + row_block * BM
    k_row = (b * K_HEADS + h // (H // K_HEADS)) * S
    v_row = (b * V_HEADS + h // (H // V_HEADS)) * S
    first = tl.load(First + b * T + rows, mask=rows < T, other=S)
    first_row = tl.maximum(first - (S - T), 0)

    m = tl.load(Sink + bh * T + rows, mask=rows < T, other=float("-inf")) * LOG2_E
    l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BM, BLOCK_D], dtype=tl.float32)
    oldest = tl.min(first, 0) // BN * BN
    newest = tl.minimum(T, row_block * BM + BM) - 1 + S - T - W
    for start in range(oldest, newest + 1, BN):
        if HAS_V:
            # Asked for before the products of the logits, which hide the wait.
            v = V.load([v_row + start, 0])
        s = _logits(Q, K, q_row, k_row + start, rows, first_row, SEGMENTS, CQ, D, BLOCK_D, BM, BN, BK, PRECISION)
        cols = start + tl.arange(0, BN)
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
        d = tl.arange(0, BLOCK_D)
        o = (acc / l_or_1[:, None]).to(O.dtype.element_ty)
        o_ptr = O + bh.to(tl.int64) * T * D + rows[:, None] * D + d[None, :]
        tl.store(o_ptr, o, mask=(rows[:, None] < T) & (d[None, :] < D))


@triton.jit
def _panel_tile(First, T, S, W, row0, n_rows, col0, width, H, BM: tl.constexpr, BN: tl.constexpr):
    """Of a tile: b, h, rows, columns, first keys, places in the panel and their mask, and whether all is hidden."""
    bh = tl.program_id(2)
    panel_rows = tl.program_id(1) * BM + tl.arange(0, BM)
    panel_cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, cols = row0 + panel_rows, col0 + panel_cols
    out = bh.to(tl.int64) * n_rows * width + panel_rows.to(tl.int64)[:, None] * width + panel_cols[None, :]
    mask = (panel_rows[:, None] < n_rows) & (panel_cols[None, :] < width)
    first = tl.load(First + bh // H * T + rows, mask=rows < T, other=S)
    newest = tl.minimum(T, row0 + tl.program_id(1) * BM + BM) - 1 + S - T - W
    start = col0 + tl.program_id(0) * BN
    hidden = (start > newest) | (start + BN <= tl.min(first, 0))
    return bh // H, bh % H, rows, cols, first, out, mask, hidden


@triton.jit
def _weights_kernel(
    Q, K, LSE, First, P, T, S, W, scale, row0, n_rows, col0, width, H, K_HEADS,
    SEGMENTS: tl.constexpr, CQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P in one tile of the panel (B, H, n_rows, width) of rows row0.. and columns col0..; zero at keys not far."""
    b, h, rows, cols, first, out, mask, hidden = _panel_tile(First, T, S, W, row0, n_rows, col0, width, H, BM, BN)
    if hidden:
        tl.store(P + out, tl.zeros([BM, BN], dtype=P.dtype.element_ty), mask=mask)
    else:
        first_row = tl.maximum(first - (S - T), 0)
        q_row = (b * H + h) * (T + CQ - 1) + CQ - 1 + row0 + tl.program_id(1) * BM
        k_row = (b * K_HEADS + h // (H // K_HEADS)) * S + col0 + tl.program_id(0) * BN
        s = _logits(Q, K, q_row, k_row, rows, first_row, SEGMENTS, CQ, D, BLOCK_D, BM, BN, BK, PRECISION)
        lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=0.0)
        visible = (cols[None, :] >= first[:, None]) & (cols[None, :] <= rows[:, None] + (S - T - W))
        p = tl.where(visible, tl.exp2(s * (scale * LOG2_E) - lse[:, None] * LOG2_E), 0.0)
        tl.store(P + out, p.to(P.dtype.element_ty), mask=mask)


@triton.jit
def _score_gradients_kernel(
    dO, V, Delta, First, P, T, S, W, scale, row0, n_rows, col0, width, H, V_HEADS,
    CV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P becomes dS = scale * P (dO Vᵀ - Delta) in one tile; dO and V have CV vectors of D for each query and key."""
    b, h, rows, _, _, out, mask, hidden = _panel_tile(First, T, S, W, row0, n_rows, col0, width, H, BM, BN)
    if not hidden:
        do_row = (b * H + h) * T + row0 + tl.program_id(1) * BM
        v_row = (b * V_HEADS + h // (H // V_HEADS)) * S + col0 + tl.program_id(0) * BN
        # Asked for before the products, which hide the wait.
        p = tl.load(P + out, mask=mask, other=0.0)
        dp = tl.zeros([BM, BN], dtype=tl.float32)
        for slice in range(tl.cdiv(CV * D, BK)):
            do = dO.load([do_row, slice * BK])
            dp = tl.dot(do, tl.trans(V.load([v_row, slice * BK])), dp, input_precision=PRECISION)
        delta = tl.load(Delta + (b * H + h) * T + rows, mask=rows < T, other=0.0)
        ds = p.to(tl.float32) * (dp - delta[:, None]) * scale
        tl.store(P + out, ds.to(P.dtype.element_ty), mask=mask)


@triton.jit
def _row_products_kernel(X, Y, Out, n_rows, N: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr):
    """Out[r] = X[r] · Y[r] over N columns, in fp32."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros([BM, BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        place, mask = (
            rows.to(tl.int64)[:, None] * N + columns[None, :],
            (rows[:, None] < n_rows) & (columns[None, :] < N),
        )
        x = tl.load(X + place, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(Y + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(Out + rows, tl.sum(total, 1), mask=rows < n_rows)


def tiles(dtype: torch.dtype, block_d: int, device: torch.device) -> dict[str, int]:
    """The largest tiles that fit on chip; fixed rather than timed at run time, as sums depend on their order."""
    size = dtype.itemsize
    if size == 4:
        choices = [(64, 64, 32, 4, 2)] if block_d <= 64 else []
        choices += [(64, 32, 32, 4, 2), (32, 32, 32, 4, 1)]
    else:
        choices = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 8, 2), (64, 64, 64, 4, 2)]
        choices += [(64, 32, 32, 4, 1)]

    def bytes_needed(bm: int, bn: int, bk: int, _: int, stages: int) -> int:
        """Each stage holds slices of q and k; the values of the running tile come beside them."""
        return (stages * (bm + bn) * min(bk, block_d) + bn * block_d) * size

    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    bm, bn, bk, warps, stages = next((c for c in choices if bytes_needed(*c) <= shared), choices[-1])
    return {"BM": bm, "BN": bn, "BK": min(bk, block_d), "num_warps": warps, "num_stages": stages}


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of tiles of x's last axis by all the others; what is outside reads as zero."""
    n_columns = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // n_columns, n_columns], [n_columns, 1], [rows, columns])


class _Far:
    """Launches the kernels for one call's tensors, in the shapes that `_FarAttention` takes."""

    def __init__(self, q, k, v, first_BT, segments: bool, W: int, scale: float):
        D = q.shape[-1]
        self.q, self.k, self.v, self.first_BT, self.W, self.scale = q, k, v, first_BT, W, scale
        block_d = block_of(D)
        self.tile = tiles(q.dtype, block_d, q.device)
        self.constants = {"D": D, "BLOCK_D": block_d, "PRECISION": precision(q.dtype), **self.tile}
        n_lags = k.shape[3]
        # With zeros above each head's first query: the kernels look n_lags - 1 rows back.
        padded_q = F.pad(q, (0, 0, n_lags - 1, 0)) if n_lags > 1 else q
        self.logits = (
            _descriptor(padded_q, self.tile["BM"], self.tile["BK"]),
            _descriptor(k.flatten(3), self.tile["BN"], self.tile["BK"]),
        )
        self.logits_options = {"CQ": n_lags, "SEGMENTS": segments and n_lags > 1}

    def columns_visible(self, row: int) -> int:
        """Number of keys at least W before the row, rounded up: the matrix library is slow on odd sizes."""
        T, S = self.q.shape[2], self.k.shape[2]
        return min(S, max(0, -(-(row + S - T - self.W + 1) // PANEL_STEP) * PANEL_STEP))

    def forward(self, sink: torch.Tensor, o: torch.Tensor | None, lse: torch.Tensor) -> None:
        """Fills lse, and o unless None."""
        B, H, T, _ = self.q.shape
        v = self.logits[1] if o is None else _descriptor(self.v, self.tile["BN"], self.constants["BLOCK_D"])
        _forward_kernel[(triton.cdiv(T, self.tile["BM"]), B * H)](
            *self.logits, v, sink, self.first_BT, lse if o is None else o, lse,
            T, self.k.shape[2], self.W, self.scale, H, self.k.shape[1], self.v.shape[1],
            HAS_V=o is not None, **self.logits_options, **self.constants,
        )  # fmt: skip

    def _place(self, panel: torch.Tensor, row0: int, col0: int) -> tuple:
        _, H, T, _ = self.q.shape
        n_rows, width = panel.shape[2:]
        return self.first_BT, panel, T, self.k.shape[2], self.W, self.scale, row0, n_rows, col0, width, H

    def weights(self, lse: torch.Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
        """P for ranges of rows and columns: (B, H, rows, >= cols)."""
        B, H = self.q.shape[:2]
        # The matrix library wants aligned rows.
        panel = self.q.new_empty(B, H, rows[1] - rows[0], -(-(cols[1] - cols[0]) // 16) * 16)
        _weights_kernel[_grid(panel, self.tile)](
            *self.logits, lse, *self._place(panel, rows[0], cols[0]), self.k.shape[1],
            **self.logits_options, **self.constants,
        )  # fmt: skip
        return panel

    def weights_to_score_gradients(self, panel: torch.Tensor, row0: int, col0: int, do: torch.Tensor, delta) -> None:
        """P of `weights` becomes dS, in place; do (B, H, T, CV, D)."""
        # Waits for memory more than for products: smaller tiles, several at a time on a processor.
        tile = self.tile | {"BN": min(self.tile["BN"], 128)}
        _score_gradients_kernel[_grid(panel, tile)](
            _descriptor(do.flatten(3), tile["BM"], tile["BK"]), _descriptor(self.v.flatten(3), tile["BN"], tile["BK"]),
            delta, *self._place(panel, row0, col0), self.v.shape[1], CV=self.v.shape[3], **(self.constants | tile),
        )  # fmt: skip


def _grid(panel: torch.Tensor, tile: dict[str, int]) -> tuple[int, int, int]:
    B, H, n_rows, width = panel.shape
    return triton.cdiv(width, tile["BN"]), triton.cdiv(n_rows, tile["BM"]), B * H


def _multiply_panel(panel_BHRC: torch.Tensor, x_BGCD: torch.Tensor) -> torch.Tensor:
    """panel @ x for each head, x's heads shared by H / G heads of the panel; columns beyond x's are left out."""
    (B, H, R, C), (G, n_cols) = panel_BHRC.shape, x_BGCD.shape[1:3]
    return (panel_BHRC.view(B, G, -1, C)[..., :n_cols] @ x_BGCD).view(B, H, R, -1)


def _multiply_panel_transposed(panel_BHRC: torch.Tensor, x_BHRD: torch.Tensor, out_BGCD: torch.Tensor) -> None:
    """out = panelᵀ @ x, summed over the heads that share one of G; out may be rows of a larger tensor."""
    B, G, n_cols, D = out_BGCD.shape
    panel = panel_BHRC.view(B * G, -1, panel_BHRC.shape[3])[..., :n_cols].transpose(1, 2)
    # Straight into its place: a copy of each panel's result takes longer than the product.
    torch.bmm(panel, x_BHRD.reshape(B * G, -1, D), out=out_BGCD.flatten(0, 1))


def _row_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B, H, T) in fp32: the products of x and y, both (B, H, T, ...), summed over all but those axes."""
    out = x.new_empty(x.shape[:3], dtype=torch.float32)
    n = x[0, 0, 0].numel()
    _row_products_kernel[(triton.cdiv(out.numel(), 32),)](
        x, y, out, out.numel(), N=n, BLOCK=min(128, block_of(n)), BM=32
    )
    return out


def _ranges(n: int, step: int) -> list[tuple[int, int]]:
    """[start, end) over 0..n, in multiples of PANEL_STEP."""
    step = max(PANEL_STEP, step // PANEL_STEP * PANEL_STEP)
    return [(start, min(n, start + step)) for start in range(0, n, step)]


class _FarAttention(torch.autograd.Function):
    """Softmax attention over a sink logit of each row and the keys at least W positions before it.

    Args:
        q, k, v: (B, H, T, D), (B, KH, S, CQ, D), (B, VH, S, CV, D); the logit is the sum over a of q[i - a] · k[j, a].
        sink: (B, H, T) fp32, -inf for none.
        first_BT: of `first_keys`; segments: whether it is other than 0 anywhere.

    Returns:
        o (B, H, T, CV, D), to which the sink adds nothing, and the log-sum-exp of each row with its sink (B, H, T),
        -inf in empty rows.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, first_BT, segments, W, scale):
        B, H, T, D = q.shape
        CV = v.shape[3]
        far = _Far(q, k, v, first_BT, segments, W, scale)
        o, lse = q.new_empty(B, H, T, CV, D), q.new_empty(B, H, T, dtype=torch.float32)
        far.forward(sink, o if CV == 1 else None, lse)
        if CV > 1:
            for rows in _ranges(T, PANEL_ELEMENTS // (B * H * k.shape[2])):
                n_cols = far.columns_visible(rows[1] - 1)
                if n_cols == 0:
                    o[:, :, slice(*rows)] = 0
                    continue
                p = far.weights(lse, rows, (0, n_cols))
                o[:, :, slice(*rows)] = _multiply_panel(p, v[:, :, :n_cols].flatten(3)).unflatten(-1, (CV, D))
        ctx.save_for_backward(q, k, v, sink, first_BT, o, lse)
        ctx.options = segments, W, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, sink, first_BT, o, lse = ctx.saved_tensors
        segments, W, scale = ctx.options
        far = _Far(q, k, v, first_BT, segments, W, scale)
        (B, H, T, _), (S, CQ) = q.shape, k.shape[2:4]
        do = do.contiguous()
        delta = _row_products(do, o) - dlse
        past_q = spread_lags(q, CQ, first_BT, S, -1).flatten(3) if CQ > 1 else q
        dq = torch.zeros_like(q, dtype=torch.float32)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        n_cols = far.columns_visible(T - 1)
        dk[:, :, n_cols:], dv[:, :, n_cols:] = 0, 0
        for cols in _ranges(n_cols, PANEL_ELEMENTS // (B * H * T)):
            here = slice(*cols)
            row0 = max(0, cols[0] + W - (S - T)) // 16 * 16
            panel = far.weights(lse, (row0, T), cols)
            _multiply_panel_transposed(panel, do[:, :, row0:].flatten(3), dv[:, :, here].flatten(3))
            far.weights_to_score_gradients(panel, row0, cols[0], do, delta)
            _multiply_panel_transposed(panel, past_q[:, :, row0:], dk[:, :, here].flatten(3))
            g = _multiply_panel(panel, k[:, :, here].flatten(3)).unflatten(3, (CQ, -1))
            fold_lags(g, dq, first_BT, S, 1, add=True)
        # An empty row has no sink either: -inf - -inf.
        dsink = -delta * torch.exp(sink - lse.masked_fill(lse == -torch.inf, 0))
        return dq.to(q.dtype), dk, dv, dsink, None, None, None, None


def mta_triton_kq(q_BHTD, k_BGSD, v_BGSD, *, kq_pre, kq_post, segment_ids, scale) -> torch.Tensor:
    """See `shared.kernels.mta.mta_attention`; D <= 128, values as wide as keys."""
    S, D = k_BGSD.shape[2:]
    if D % 8:  # descriptors need rows of whole 16 bytes
        wider = (F.pad(x, (0, -D % 8)) for x in (q_BHTD, k_BGSD, v_BGSD))
        return mta_triton_kq(*wider, kq_pre=kq_pre, kq_post=kq_post, segment_ids=segment_ids, scale=scale)[..., :D]
    q_BHTD, k_BGSD, v_BGSD = q_BHTD.contiguous(), k_BGSD.contiguous(), v_BGSD.contiguous()
    pre_lags, pre_reach = (kq_pre.shape[1], kq_pre.shape[2] // 2) if kq_pre is not None else (1, 0)
    post_lags, post_reach = (kq_post.shape[1], kq_post.shape[2] // 2) if kq_post is not None else (1, 0)
    W = max(1, pre_lags - 1 + pre_reach, post_reach)
    first_BT = first_keys(segment_ids, q_BHTD, S)

    # Logits of the W newest keys of each query.
    near_B1Tn = near_keys(first_BT, S, W + pre_reach)
    band_BHTn = (band_dot(q_BHTD, k_BGSD, W + pre_reach) * scale).masked_fill(~near_B1Tn, 0)
    if kq_pre is not None:
        band_BHTn = convolve_band(band_BHTn, kq_pre, W, first_BT, S)
    band_BHTn = band_BHTn.masked_fill(~near_B1Tn[..., :W], -torch.inf)

    expanded_k = k_BGSD.unsqueeze(3) if kq_pre is None else expand_lags(k_BGSD, kq_pre, segment_ids)
    expanded_v = v_BGSD.unsqueeze(3) if kq_post is None else expand_lags(v_BGSD, kq_post.flip(2), segment_ids)
    sink_BHT = band_BHTn.logsumexp(-1)
    has_segments = segment_ids is not None
    far_BHTAD, lse_BHT = _FarAttention.apply(q_BHTD, expanded_k, expanded_v, sink_BHT, first_BT, has_segments, W, scale)

    # Rows of padding have no key at all.
    band_BHTn = torch.exp(band_BHTn - lse_BHT.masked_fill(lse_BHT == -torch.inf, 0)[..., None])
    if kq_post is None:
        return band_apply(band_BHTn, v_BGSD, far_BHTAD.squeeze(3))
    n_out = post_lags - 1 + W + post_reach
    band_BHTn = convolve_band(band_BHTn, kq_post, n_out, first_BT, S) * near_keys(first_BT, S, n_out)
    return band_apply(band_BHTn, v_BGSD, add_lags(far_BHTAD, first_BT, S))
