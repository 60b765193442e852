"""Bands against full maps, lags against loops, the factorisation over lags against the convolution; all in float64."""

import pytest
import torch

from shared.kernels.mta_reference import convolve_map

SEGMENTS = torch.tensor([[0] * 3 + [4] * 22 + [5] * 15, [-1] * 5 + [0] * 34 + [-1]])


def full(band_BHTn: torch.Tensor, S: int) -> torch.Tensor:
    """The (T, S) map with the band next to its diagonal and zeros elsewhere."""
    B, H, T, n = band_BHTn.shape
    x = torch.zeros(B, H, T, S, dtype=band_BHTn.dtype)
    for r in range(T):
        for t in range(n):
            if S - T + r - t >= 0:
                x[:, :, r, S - T + r - t] = band_BHTn[:, :, r, t]
    return x


def banded(x_BHTS: torch.Tensor, n: int) -> torch.Tensor:
    T, S = x_BHTS.shape[2:]
    band = torch.zeros(*x_BHTS.shape[:3], n, dtype=x_BHTS.dtype)
    for r in range(T):
        for t in range(min(n, S - T + r + 1)):
            band[:, :, r, t] = x_BHTS[:, :, r, S - T + r - t]
    return band


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(compute, expected, inputs, device):
    """Output and gradients of `compute` in fp32 against those of `expected`, a float64 tensor made from `inputs`."""
    low = [x.detach().to(device, torch.float32).requires_grad_() for x in inputs]
    output = compute(*low)
    grad = torch.randn_like(expected)
    pairs = [(output, expected)]
    pairs += zip(
        torch.autograd.grad(output, low, grad.to(output)), torch.autograd.grad(expected, inputs, grad), strict=True
    )
    for got, want in pairs:
        torch.testing.assert_close(got.double().cpu(), want, rtol=2e-5, atol=2e-5)


def first_keys(triton_tiles, segments, q):
    return triton_tiles["band"].first_keys(segments, q, 40 if segments is not None else q.shape[2])


@pytest.mark.parametrize(("T", "S", "n"), [(5, 5, 3), (35, 35, 4), (9, 40, 12), (33, 33, 20), (3, 4, 9), (32, 32, 1)])
def test_products_of_bands_and_their_gradients(T, S, n, device, triton_tiles):
    band_kernels = triton_tiles["band"]
    q, k, v, band, base = randn(2, 4, T, 8), randn(2, 2, S, 8), randn(2, 2, S, 8), randn(2, 4, T, n), randn(2, 4, T, 8)
    whole = banded(q @ k.repeat_interleave(2, 1).transpose(-1, -2), n)
    check(lambda q, k: band_kernels.band_dot(q, k, n), whole, (q, k), device)
    whole = base + full(band, S) @ v.repeat_interleave(2, 1)
    check(band_kernels.band_apply, whole, (band, v, base), device)


@pytest.mark.parametrize("kernel_shape", [(1, 1), (3, 5), (4, 3)])
def test_convolution_of_a_band(kernel_shape, device, triton_tiles):
    c_q, c_k = kernel_shape
    exists = banded(torch.ones(1, 1, 30, 33, dtype=torch.float64), 4)
    x, kernel = randn(2, 2, 30, 4), randn(2, *kernel_shape)
    n_out = c_q - 1 + 4 + c_k // 2  # as far as the band reaches
    expected = banded(convolve_map(full(x * exists, 33), kernel, None), n_out)
    seen = banded(torch.ones(1, 1, 30, 33), n_out).to(device)  # beyond the first key a band has entries, a map none
    first = torch.zeros(2, 30, dtype=torch.int32, device=device)

    def compute(x, kernel):
        return triton_tiles["band"].convolve_band(x * exists.to(x), kernel, n_out, first, 33) * seen

    check(compute, expected, (x, kernel), device)


def test_expanded_keys_give_the_far_logits(device, triton_tiles):
    """The sum over lags of shifted queries by expanded keys is the convolution of the masked scores, far enough off."""
    band, (c_q, c_k), T = triton_tiles["band"], (3, 5), 40
    q, k, kernel = randn(1, 4, T, 8), randn(1, 2, T, 8), randn(4, c_q, c_k)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).tril()
    expected = convolve_map(scores, kernel, None)
    low_q, low_k, low_kernel = (x.detach().to(device, torch.float32) for x in (q, k, kernel))
    keys = band.expand_lags(low_k, low_kernel, None)
    queries = band.spread_lags(low_q, c_q, first_keys(triton_tiles, None, low_q), T, -1)
    got = torch.einsum("bhiad,bhjad->bhij", queries, keys).double().cpu()
    offset = -(c_q - 1 + c_k // 2)
    torch.testing.assert_close(got.tril(offset), expected.tril(offset), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got.tril(offset + 1), expected.tril(offset + 1), atol=1e-2)


def test_expanded_values_give_the_far_outputs(device, triton_tiles):
    band, (c_q, c_k), T = triton_tiles["band"], (3, 5), 40
    weights = torch.rand(1, 2, T, T, dtype=torch.float64).tril(-(c_k // 2))
    v, kernel = randn(1, 2, T, 8), randn(2, c_q, c_k)
    expected = convolve_map(weights, kernel, None).tril() @ v
    first = torch.zeros(1, T, dtype=torch.int32, device=device)

    def compute(v, kernel):
        values = band.expand_lags(v, kernel.flip(2), None)
        far = torch.einsum("bhij,bhjad->bhiad", weights.to(v), values)
        return band.add_lags(far.contiguous(), first, T)

    check(compute, expected, (v, kernel), device)


def test_lags_and_offsets_end_with_the_segment(device, triton_tiles):
    band, T, S, c_q, c_k = triton_tiles["band"], 37, 40, 3, 5
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS[:, :, None] >= 0)
    k, kernel, x = randn(2, 1, S, 8), randn(2, c_q, c_k), randn(2, 2, T, c_q, 8)
    real = (SEGMENTS >= 0)[:, None, :, None, None]

    expanded = torch.zeros(2, 2, S, c_q, 8, dtype=torch.float64)
    for j in range(S):
        for other in range(max(0, j - c_k // 2), min(S, j + c_k // 2 + 1)):
            tap = kernel.flip(1)[:, :, other - j + c_k // 2]
            seen = same[:, j, other].double()[:, None, None, None]
            expanded[:, :, j] = expanded[:, :, j] + seen * tap[None, :, :, None] * k[:, :, other, None]
    segments = SEGMENTS.to(device)

    def compute(k, kernel):
        return band.expand_lags(k, kernel, segments) * real.to(k)

    check(compute, expanded, (k, kernel), device)

    added = torch.zeros(2, 2, T, 8, dtype=torch.float64)
    for r in range(T):
        for a in range(min(c_q, r + 1)):
            seen = same[:, S - T + r, S - T + r - a].double()[:, None, None]
            added[:, :, r] = added[:, :, r] + seen * x[:, :, r - a, a]
    first = band.first_keys(segments, x[:, :, :, 0].detach().to(device), S)
    check(lambda x: band.add_lags(x, first, S), added, (x,), device)
    near = band.near_keys(first, S, 4).cpu()
    for r in range(T):
        for t in range(4):
            assert torch.equal(near[:, 0, r, t], same[:, S - T + r, S - T + r - t])
