"""Multi-Token Attention by its literal equations, every (T, S) map in memory: the definition of truth.

This is also the algorithm of the paper's released code, with its full-size maps and its depthwise `conv2d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_mask(segment_ids_BS: torch.Tensor | None, n_queries: int, n_keys: int, device) -> torch.Tensor:
    """(B or 1, 1, T, S), True where a query may see a key: not after it, in its segment, neither of them padding."""
    query_T = torch.arange(n_keys - n_queries, n_keys, device=device)
    allowed_TS = torch.arange(n_keys, device=device) <= query_T[:, None]
    if segment_ids_BS is None:
        return allowed_TS[None, None]
    query_BT1 = segment_ids_BS[:, n_keys - n_queries :, None]
    same_BTS = (query_BT1 == segment_ids_BS[:, None, :]) & (query_BT1 >= 0)
    return (same_BTS & allowed_TS)[:, None]


def convolve_map(x_BHTS: torch.Tensor, kernel_HAO: torch.Tensor, row_segments_BT: torch.Tensor | None) -> torch.Tensor:
    """Key-query convolution (Eq. 5): y[i, j] = sum over a, o of kernel[a, o] x[i - a, j + o], zero outside the map.

    `kernel_HAO` is stored as a conv2d weight: its last row is the current query, its middle column the same key. Rows
    of another segment than row i count as zero; their keys are those of that segment, which the caller has masked.
    """
    H, n_lags, width = kernel_HAO.shape
    pad = (width // 2, width // 2, n_lags - 1, 0)
    if row_segments_BT is None:
        return F.conv2d(F.pad(x_BHTS, pad), kernel_HAO[:, None], groups=H)
    y_BHTS = torch.zeros_like(x_BHTS)
    for lag in range(min(n_lags, x_BHTS.shape[2])):
        row_H1O = kernel_HAO[:, n_lags - 1 - lag].reshape(H, 1, 1, width)
        shifted_BHTS = F.conv2d(F.pad(x_BHTS, (*pad[:2], lag, 0))[:, :, : x_BHTS.shape[2]], row_H1O, groups=H)
        past_BT = F.pad(row_segments_BT, (lag, 0), value=-1)[:, : row_segments_BT.shape[1]]
        y_BHTS = y_BHTS + shifted_BHTS * (past_BT == row_segments_BT)[:, None, :, None]
    return y_BHTS


def mix_heads_pre(x_BHTS: torch.Tensor, mix_HH: torch.Tensor) -> torch.Tensor:
    """y_g = sum over h of mix[g, h] x_h."""
    return torch.einsum("gh,bhts->bgts", mix_HH, x_BHTS)


def mix_heads_post(x_BHTS: torch.Tensor, mix_NCC: torch.Tensor) -> torch.Tensor:
    """In each of N groups of C heads, y_m = sum over h of mix[h, m] x_h: the other side than before the softmax."""
    grouped = x_BHTS.unflatten(1, mix_NCC.shape[:2])
    return torch.einsum("nhm,bnhts->bnmts", mix_NCC, grouped).flatten(1, 2)


def mta_reference(
    q_BHTD, k_BGSD, v_BGSD, *, kq_pre, kq_post, head_pre, head_post, segment_ids, scale, dropout_p
) -> torch.Tensor:
    """See `shared.kernels.mta.mta_attention`. Maps are in q's dtype, as are the learned kernels; softmax in >= fp32."""
    _, H, T, _ = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    dtype = q_BHTD.dtype
    kq_pre, kq_post, head_pre, head_post = (
        None if kernel is None else kernel.to(dtype) for kernel in (kq_pre, kq_post, head_pre, head_post)
    )
    k_BHSD, v_BHSD = k_BGSD.repeat_interleave(H // G, dim=1), v_BGSD.repeat_interleave(H // G, dim=1)
    hidden = ~attention_mask(segment_ids, T, S, q_BHTD.device)
    rows = None if segment_ids is None else segment_ids[:, S - T :]

    x_BHTS = (q_BHTD @ k_BHSD.transpose(-1, -2) * scale).masked_fill(hidden, 0)
    if kq_pre is not None:
        x_BHTS = convolve_map(x_BHTS, kq_pre, rows)
    if head_pre is not None:
        x_BHTS = mix_heads_pre(x_BHTS, head_pre)
    # Padding's rows have no key to attend to: uniform there, then zero, rather than NaN.
    empty_row = hidden.all(dim=-1, keepdim=True)
    x_BHTS = x_BHTS.masked_fill(hidden & ~empty_row, -torch.inf)
    x_BHTS = torch.softmax(x_BHTS, dim=-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    x_BHTS = x_BHTS.masked_fill(hidden, 0)
    if kq_post is not None:
        x_BHTS = convolve_map(x_BHTS, kq_post, rows).masked_fill(hidden, 0)
    if head_post is not None:
        x_BHTS = mix_heads_post(x_BHTS, head_post)
    if dropout_p > 0:
        x_BHTS = F.dropout(x_BHTS, dropout_p)
    return x_BHTS @ v_BHSD
