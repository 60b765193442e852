"""RMS norm and gate of each head's output in one pass forward and one backward (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# Programs of backward, each of which sums the weights' gradients over its rows.
PROGRAMS = 512
ROWS = 32


@triton.jit
def _normalised(
    X, Weight, Gate, Bias, rows, n_rows, eps, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GATE: tl.constexpr
):  # fmt: skip
    """x, 1 / rms(x), scale * weight, n = x / rms * scale * weight, and the gate (1 without); fp32."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < n_rows) & (d[None, :] < D)
    x = tl.load(X + rows.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(Weight + d, mask=d < D, other=0.0).to(tl.float32) * scale
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    n = x * rstd[:, None] * weight[None, :]
    gate = tl.full(rows.shape, 1.0, dtype=tl.float32)
    if HAS_GATE:
        gate_weight = tl.load(Gate + d, mask=d < D, other=0.0).to(tl.float32)
        gate = tl.sigmoid(tl.sum(n * gate_weight[None, :], 1) + tl.load(Bias).to(tl.float32))
    return x, rstd, weight, n, gate


@triton.jit
def _forward_kernel(
    X, Weight, Gate, Bias, Y, n_rows, eps, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BLOCK_D)
    _, _, _, n, gate = _normalised(X, Weight, Gate, Bias, rows, n_rows, eps, scale, D, BLOCK_D, HAS_GATE)
    y = (n * gate[:, None]).to(Y.dtype.element_ty)
    tl.store(Y + rows.to(tl.int64)[:, None] * D + d[None, :], y, mask=(rows[:, None] < n_rows) & (d[None, :] < D))


@triton.jit
def _backward_kernel(
    X, Weight, Gate, Bias, dY, dX, dWeight, dGate, dBias, n_rows, eps, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """dX, and the program's part of the weights' gradients: (programs, D) twice and (programs,)."""
    d = tl.arange(0, BLOCK_D)
    d_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
    d_gate = tl.zeros([BLOCK_D], dtype=tl.float32)
    d_bias = tl.zeros([BM], dtype=tl.float32)
    for start in range(tl.program_id(0) * BM, n_rows, tl.num_programs(0) * BM):
        rows = start + tl.arange(0, BM)
        mask = (rows[:, None] < n_rows) & (d[None, :] < D)
        place = rows.to(tl.int64)[:, None] * D + d[None, :]
        x, rstd, weight, n, gate = _normalised(X, Weight, Gate, Bias, rows, n_rows, eps, scale, D, BLOCK_D, HAS_GATE)
        dy = tl.load(dY + place, mask=mask, other=0.0).to(tl.float32)
        dn = dy * gate[:, None]
        if HAS_GATE:
            d_logit = tl.sum(dy * n, 1) * gate * (1.0 - gate)
            gate_weight = tl.load(Gate + d, mask=d < D, other=0.0).to(tl.float32)
            dn += d_logit[:, None] * gate_weight[None, :]
            d_gate += tl.sum(d_logit[:, None] * n, 0)
            d_bias += d_logit
        x_hat = x * rstd[:, None]
        d_weight += tl.sum(dn * x_hat, 0) * scale
        d_hat = dn * weight[None, :]
        dx = rstd[:, None] * (d_hat - x_hat * (tl.sum(d_hat * x_hat, 1) / D)[:, None])
        tl.store(dX + place, dx.to(dX.dtype.element_ty), mask=mask)
    part = tl.program_id(0) * D + d
    tl.store(dWeight + part, d_weight, mask=d < D)
    if HAS_GATE:
        tl.store(dGate + part, d_gate, mask=d < D)
        tl.store(dBias + tl.program_id(0), tl.sum(d_bias))


class HeadNormGate(torch.autograd.Function):
    """As `shared.kernels.mta_norm_gate.reference`; gate_weight and gate_bias are both given or both None."""

    @staticmethod
    def forward(ctx, o_BHTD, weight_D, gate_weight, gate_bias, eps, scale):
        x_BHTD, D = o_BHTD.contiguous(), o_BHTD.shape[-1]
        # Without a gate its weights are not read.
        gate = (x_BHTD, x_BHTD) if gate_weight is None else (gate_weight, gate_bias)
        ctx.save_for_backward(x_BHTD, weight_D, gate_weight, gate_bias)
        ctx.numbers = (x_BHTD.numel() // D, float(eps), float(scale))
        ctx.constants = {"D": D, "BLOCK_D": triton.next_power_of_2(D), "BM": ROWS, "HAS_GATE": gate_weight is not None}
        y_BHTD = torch.empty_like(x_BHTD)
        _forward_kernel[(triton.cdiv(ctx.numbers[0], ROWS),)](
            x_BHTD, weight_D, *gate, y_BHTD, *ctx.numbers, **ctx.constants
        )
        return y_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BHTD):
        x_BHTD, weight_D, gate_weight, gate_bias = ctx.saved_tensors
        gate = (x_BHTD, x_BHTD) if gate_weight is None else (gate_weight, gate_bias)
        n_programs = min(PROGRAMS, triton.cdiv(ctx.numbers[0], ROWS))
        dx_BHTD = torch.empty_like(x_BHTD)
        d_weight, d_gate = x_BHTD.new_empty(2, n_programs, x_BHTD.shape[-1], dtype=torch.float32)
        d_bias = d_gate.new_empty(n_programs)
        _backward_kernel[(n_programs,)](
            x_BHTD, weight_D, *gate, dy_BHTD.contiguous(), dx_BHTD, d_weight, d_gate, d_bias,
            *ctx.numbers, **ctx.constants,
        )  # fmt: skip
        grads = [dx_BHTD, d_weight.sum(0).to(weight_D.dtype), None, None, None, None]
        if gate_weight is not None:
            grads[2] = d_gate.sum(0).to(gate_weight.dtype)
            grads[3] = d_bias.sum().to(gate_bias.dtype).view_as(gate_bias)
        return tuple(grads)
