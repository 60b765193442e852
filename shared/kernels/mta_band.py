"""The near-diagonal band of an attention map as a (T, n) array, and key-query convolution within it.

Next to the diagonal the convolution of Eq. 5 meets the causal mask, and its two factorisations over the lags a,

    before the softmax  L[i, j] = sum over a of q_{i-a} · K_a[j]           K_a[j] = sum over o of κ[a, o] k_{j+o}
    after it            O_i     = sum over a, m of A[i-a, m] V_a[m]        V_a[m] = sum over o of κ²[a, o] v_{m-o}

fail, as the sums over o would take in keys later than the query. They hold for keys j <= i - (c_q - 1) - (c_k - 1) / 2
and m <= i - (c_k - 1) / 2. The entries nearer than that are computed exactly, here.

Entry [r, t] of a band belongs to query r and to the key t positions before it. Queries are the last T of S positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Rows of the dense blocks along the diagonal through which bands are computed.
BLOCK = 64


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _row_blocks(x_BHTD: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, blocks, size, D), zero rows at the end."""
    return F.pad(x_BHTD, (0, 0, 0, -x_BHTD.shape[2] % size)).unflatten(2, (-1, size))


def _key_windows(x_BHSD: torch.Tensor, n_queries: int, n: int, size: int) -> torch.Tensor:
    """(B, H, blocks, size + n - 1, D): for each block of queries the keys from n - 1 before its first to its last."""
    before = n_queries - x_BHSD.shape[2] + n - 1  # zero rows above where positive, superfluous keys where negative
    x_BHSD = F.pad(x_BHSD, (0, 0, before, -n_queries % size))
    return x_BHSD.unfold(2, size + n - 1, size).transpose(-1, -2)


def _sheared(dense_BHbRM: torch.Tensor, n: int) -> torch.Tensor:
    """View (B, H, blocks, size, n) of the blocks' diagonals: [r, c] is [r, r + c], the key n - 1 - c back."""
    *batch, size, width = dense_BHbRM.shape
    return dense_BHbRM.as_strided((*batch, size, n), (*dense_BHbRM.stride()[:-2], width + 1, 1))


def _dense(band_BHTn: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, blocks, size, size + n - 1): the band in dense blocks, beside zeros."""
    n = band_BHTn.shape[-1]
    blocks_BHbRn = _row_blocks(band_BHTn.flip(-1), size)
    dense_BHbRM = blocks_BHbRn.new_zeros(*blocks_BHbRn.shape[:-1], size + n - 1)
    _sheared(dense_BHbRM, n).copy_(blocks_BHbRn)
    return dense_BHbRM


def _dot(q_BHTD: torch.Tensor, k_BHSD: torch.Tensor, n: int) -> torch.Tensor:
    T, size = q_BHTD.shape[2], max(BLOCK, n)
    windows_BHbMD = _key_windows(_wide(k_BHSD), T, n, size)
    dense_BHbRM = _row_blocks(_wide(q_BHTD), size) @ windows_BHbMD.transpose(-1, -2)
    return _sheared(dense_BHbRM.contiguous(), n).flip(-1).flatten(2, 3)[:, :, :T]


def _apply(band_BHTn: torch.Tensor, v_BHSD: torch.Tensor) -> torch.Tensor:
    T, n = band_BHTn.shape[2:]
    size = max(BLOCK, n)
    windows_BHbMD = _key_windows(_wide(v_BHSD), T, n, size)
    return (_dense(_wide(band_BHTn), size) @ windows_BHbMD).flatten(2, 3)[:, :, :T]


def _apply_transposed(band_BHTn: torch.Tensor, x_BHTD: torch.Tensor, n_keys: int) -> torch.Tensor:
    """y_j = sum over t of band[j + t, t] x_{j+t}, for all n_keys positions j."""
    T, n = band_BHTn.shape[2:]
    size = max(BLOCK, n)
    windows_BHbMD = _dense(_wide(band_BHTn), size).transpose(-1, -2) @ _row_blocks(_wide(x_BHTD), size)
    B, H, n_blocks, _, D = windows_BHbMD.shape
    sum_BHbRD = windows_BHbMD.new_zeros(B, H, n_blocks + 1, size, D)
    sum_BHbRD[:, :, :-1] = windows_BHbMD[..., :size, :]
    sum_BHbRD[:, :, 1:, : n - 1] += windows_BHbMD[..., size:, :]
    first = T - n_keys + n - 1  # where the first key is in the windows; none has it where negative
    return F.pad(sum_BHbRD.flatten(2, 3)[:, :, max(first, 0) : T + n - 1], (0, 0, max(-first, 0), 0))


class _BandDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BHSD, n):
        ctx.save_for_backward(q_BHTD, k_BHSD)
        return _dot(q_BHTD, k_BHSD, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_BHTn):
        q_BHTD, k_BHSD = ctx.saved_tensors
        dk_BHSD = _apply_transposed(d_BHTn, q_BHTD, k_BHSD.shape[2])
        return _apply(d_BHTn, k_BHSD).to(q_BHTD.dtype), dk_BHSD.to(k_BHSD.dtype), None


class _BandApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, band_BHTn, v_BHSD):
        ctx.save_for_backward(band_BHTn, v_BHSD)
        return _apply(band_BHTn, v_BHSD)

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHTD):
        band_BHTn, v_BHSD = ctx.saved_tensors
        d_BHTn = _dot(do_BHTD, v_BHSD, band_BHTn.shape[-1])
        return d_BHTn.to(band_BHTn.dtype), _apply_transposed(band_BHTn, do_BHTD, v_BHSD.shape[2]).to(v_BHSD.dtype)


def band_dot(q_BHTD: torch.Tensor, k_BHSD: torch.Tensor, n: int) -> torch.Tensor:
    """(B, H, T, n) in at least fp32: [r, t] = q_r · k of t positions before r, zero before the first key."""
    return _BandDot.apply(q_BHTD, k_BHSD, n)


def band_apply(band_BHTn: torch.Tensor, v_BHSD: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) in at least fp32: the sum over t of band[r, t] times v of t positions before r."""
    return _BandApply.apply(band_BHTn, v_BHSD)


def shift_rows(x_BHTn: torch.Tensor, n_lags: int, same_BTA: torch.Tensor | None) -> torch.Tensor:
    """(B, H, T, c_q, n): [r, a] is row r - a; zero above the first row and where `same_BTA` is false."""
    T = x_BHTn.shape[2]
    padded = F.pad(x_BHTn, (0, 0, n_lags - 1, 0))
    shifted_BHTAn = torch.stack([padded[:, :, n_lags - 1 - a : n_lags - 1 - a + T] for a in range(n_lags)], dim=3)
    return shifted_BHTAn if same_BTA is None else shifted_BHTAn * same_BTA[:, None, :, :, None]


def add_lags(x_BHTAD: torch.Tensor, same_BTA: torch.Tensor | None) -> torch.Tensor:
    """(B, H, T, D) in at least fp32: y[r] = sum over a of x[r - a, a], absent as in `shift_rows`."""
    # One unbind rather than c_q selections, each of which would have a gradient of x's size.
    first_BHTD, *others = x_BHTAD.unbind(3)
    y_BHTD = _wide(first_BHTD)
    for a, part_BHTD in enumerate(others[: x_BHTAD.shape[2] - 1], start=1):
        part_BHTD = F.pad(part_BHTD, (0, 0, a, -a))
        y_BHTD = y_BHTD + (part_BHTD if same_BTA is None else part_BHTD * same_BTA[:, None, :, a, None])
    return y_BHTD


def convolve_band(
    x_BHTn: torch.Tensor, kernel_HAO: torch.Tensor, n_out: int, same_BTA: torch.Tensor | None
) -> torch.Tensor:
    """Eq. 5 on a band: y[i, t'] = sum over a, t of kernel[a, o] x[i - a, t] with o = t' - a - t, for t' < n_out.

    Nothing outside the band x is seen. same_BTA: whether query i - a counts for query i (`same_segment`).
    """
    _, n_lags, width = kernel_HAO.shape
    n = x_BHTn.shape[-1]
    lag_A11, back_n1, out_m = (torch.arange(size, device=x_BHTn.device) for size in (n_lags, n, n_out))
    lag_A11, back_n1 = lag_A11[:, None, None], back_n1[:, None]
    tap_Anm = out_m - lag_A11 - back_n1 + width // 2
    by_lag_HAO = kernel_HAO.to(x_BHTn.dtype).flip(1)
    mix_HAnm = by_lag_HAO[:, lag_A11, tap_Anm.clamp(0, width - 1)] * ((tap_Anm >= 0) & (tap_Anm < width))
    return shift_rows(x_BHTn, n_lags, same_BTA).flatten(3) @ mix_HAnm.flatten(1, 2)


def same_segment(segment_BS: torch.Tensor | None, n_queries: int, n: int) -> torch.Tensor | None:
    """(B, T, n): whether the position t before query r exists and is in its segment; padding is in none."""
    if segment_BS is None:
        return None
    padded_BS = F.pad(segment_BS, (n - 1, 0), value=-1)
    back_BTn = padded_BS.unfold(1, n, 1)[:, segment_BS.shape[1] - n_queries :].flip(-1)
    return (back_BTn == segment_BS[:, segment_BS.shape[1] - n_queries :, None]) & (back_BTn >= 0)


def near_keys(segment_BS: torch.Tensor | None, n_queries: int, n_keys: int, n: int, device) -> torch.Tensor:
    """(B or 1, 1, T, n): whether query r may see the key t before it, which exists and is in its segment."""
    if segment_BS is not None:
        return same_segment(segment_BS, n_queries, n)[:, None]
    query_T1 = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    return (torch.arange(n, device=device) <= query_T1)[None, None]


def expand_lags(x_BGSD: torch.Tensor, kernel_HAO: torch.Tensor, segment_BS: torch.Tensor | None) -> torch.Tensor:
    """(B, H, S, c_q, D) in x's dtype: y[j, a] = sum over o of kernel[a, o] x_{j+o} within j's segment.

    The K_a of the module's docstring; V_a with the kernel flipped in o. Computed in >= fp32: a learned kernel is close
    to the identity and would lose its difference from it in a shorter type.
    """
    G, S = x_BGSD.shape[1:3]
    H, n_lags, width = kernel_HAO.shape
    reach = width // 2
    padding = (reach, reach + -S % BLOCK)
    windows_BGbMD = F.pad(_wide(x_BGSD), (0, 0, *padding)).unfold(2, BLOCK + width - 1, BLOCK).transpose(-1, -2)
    windows_BHbMD = windows_BGbMD.repeat_interleave(H // G, dim=1)
    tap_jM = torch.arange(BLOCK + width - 1, device=x_BGSD.device) - torch.arange(BLOCK, device=x_BGSD.device)[:, None]
    by_lag_HAO = kernel_HAO.to(windows_BHbMD.dtype).flip(1)
    dense_HAjM = by_lag_HAO[:, :, tap_jM.clamp(0, width - 1)] * ((tap_jM >= 0) & (tap_jM < width))
    dense_BHbjAM = dense_HAjM.transpose(1, 2)[None, :, None]
    if segment_BS is not None:
        key_BbM = F.pad(segment_BS, padding, value=-1).unfold(1, BLOCK + width - 1, BLOCK)
        same_BbjM = key_BbM[:, :, reach : reach + BLOCK, None] == key_BbM[:, :, None]
        dense_BHbjAM = dense_BHbjAM * same_BbjM[:, None, :, :, None]
    y_BHbjAD = (dense_BHbjAM.flatten(3, 4) @ windows_BHbMD).unflatten(3, (BLOCK, n_lags))
    return y_BHbjAD.to(x_BGSD.dtype).flatten(2, 3)[:, :, :S].contiguous()
