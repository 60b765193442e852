"""RMS norm of each head's output with a scalar gate, the last step of Multi-Token Attention."""

from __future__ import annotations

import torch


def head_norm_gate(
    o_BHTD: torch.Tensor,
    weight_D: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """n = scale * o / sqrt(mean over D of o² + eps) * weight, then n * sigmoid(gate_weight · n + gate_bias).

    Each token's each head is normalised by itself, in at least fp32; all heads share the weights. `scale` is the
    depth-dependent factor of DIFF Transformer, of which the gate takes the place in the paper's final recipe.

    Args:
        o_BHTD: output of the attention heads.
        weight_D: (D,).
        gate_weight: (D,); None: no gate.
        gate_bias: one element; None: 0.
        backend: "reference", "triton", or "auto": Triton on a GPU, short of float64.

    Returns:
        (B, H, T, D) in o's dtype.

    Raises:
        ValueError: a shape is wrong, a bias comes without a gate, or the backend is unknown or has no float64.
    """
    D = o_BHTD.shape[-1]
    if weight_D.shape != (D,):
        raise ValueError(f"weight_D has shape {tuple(weight_D.shape)}; o_BHTD's last axis needs ({D},)")
    if gate_weight is not None and gate_weight.shape != (D,):
        raise ValueError(f"gate_weight has shape {tuple(gate_weight.shape)}; o_BHTD's last axis needs ({D},)")
    if gate_bias is not None and (gate_weight is None or gate_bias.numel() != 1):
        raise ValueError("gate_bias must be one number, beside a gate_weight")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown backend {backend!r}; valid: auto, reference, triton")
    if backend == "triton" and o_BHTD.dtype == torch.float64:
        raise ValueError("backend='triton' has no float64; use 'reference'")
    if backend == "auto":
        backend = "triton" if o_BHTD.is_cuda and o_BHTD.dtype != torch.float64 else "reference"

    if gate_weight is not None and gate_bias is None:
        gate_bias = gate_weight.new_zeros(())
    if backend == "triton":
        from shared.kernels.mta_triton_norm import HeadNormGate

        return HeadNormGate.apply(o_BHTD, weight_D, gate_weight, gate_bias, eps, scale)
    return reference(o_BHTD, weight_D, gate_weight, gate_bias, eps, scale)


def reference(o_BHTD, weight_D, gate_weight, gate_bias, eps, scale) -> torch.Tensor:
    x_BHTD = o_BHTD.to(torch.promote_types(o_BHTD.dtype, torch.float32))
    x_BHTD = x_BHTD * torch.rsqrt(x_BHTD.square().mean(-1, keepdim=True) + eps) * (weight_D * scale)
    if gate_weight is not None:
        x_BHTD = x_BHTD * torch.sigmoid((x_BHTD * gate_weight).sum(-1, keepdim=True) + gate_bias)
    return x_BHTD.to(o_BHTD.dtype)
