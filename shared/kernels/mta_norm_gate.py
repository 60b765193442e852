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
) -> torch.Tensor:
    """Ô = scale * o / sqrt(mean over D of o² + eps) * weight, then Ô * sigmoid(gate_weight · Ô + gate_bias).

    Each token's each head is normalised by itself, in at least fp32; all heads share the weights. `scale` is the
    depth-dependent factor of DIFF Transformer, of which the gate takes the place in the paper's final recipe.

    Args:
        o_BHTD: output of the attention heads.
        weight_D: (D,).
        gate_weight: (D,); None: no gate.
        gate_bias: one element; None: 0.

    Returns:
        (B, H, T, D) in o's dtype.

    Raises:
        ValueError: a shape is wrong, or a bias comes without a gate.
    """
    D = o_BHTD.shape[-1]
    if weight_D.shape != (D,):
        raise ValueError(f"weight_D has shape {tuple(weight_D.shape)}; o_BHTD's last axis needs ({D},)")
    if gate_weight is not None and gate_weight.shape != (D,):
        raise ValueError(f"gate_weight has shape {tuple(gate_weight.shape)}; o_BHTD's last axis needs ({D},)")
    if gate_bias is not None and (gate_weight is None or gate_bias.numel() != 1):
        raise ValueError("gate_bias must be one number, beside a gate_weight")

    x_BHTD = o_BHTD.to(torch.promote_types(o_BHTD.dtype, torch.float32))
    x_BHTD = x_BHTD * torch.rsqrt(x_BHTD.square().mean(-1, keepdim=True) + eps) * (weight_D * scale)
    if gate_weight is not None:
        logit_BHT1 = (x_BHTD * gate_weight).sum(-1, keepdim=True)
        if gate_bias is not None:
            logit_BHT1 = logit_BHT1 + gate_bias
        x_BHTD = x_BHTD * torch.sigmoid(logit_BHT1)
    return x_BHTD.to(o_BHTD.dtype)
