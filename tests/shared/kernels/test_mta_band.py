"""Bands against full maps, and the factorisation over lags against the convolution, all in float64."""

import pytest
import torch

from shared.kernels import mta_band
from shared.kernels.mta_reference import convolve_map


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


@pytest.mark.parametrize(("T", "S", "n"), [(5, 5, 3), (70, 70, 4), (9, 80, 12), (130, 130, 70), (3, 4, 9), (64, 64, 1)])
def test_products_of_bands_and_their_gradients(T, S, n):
    q, k, v, band = randn(2, 2, T, 3), randn(2, 2, S, 3), randn(2, 2, S, 4), randn(2, 2, T, n)
    pairs = [
        (mta_band.band_dot(q, k, n), banded(q @ k.transpose(-1, -2), n), (q, k)),
        (mta_band.band_apply(band, v), full(band, S) @ v, (band, v)),
    ]
    for output, expected, inputs in pairs:
        torch.testing.assert_close(output, expected)
        grad = torch.randn_like(output)
        for got, want in zip(*(torch.autograd.grad(o, inputs, grad) for o in (output, expected)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel_shape", [(1, 1), (3, 5), (4, 3)])
def test_convolution_of_a_band(kernel_shape):
    c_q, c_k = kernel_shape
    x, kernel = randn(2, 2, 9, 4), randn(2, *kernel_shape)
    n_out = c_q - 1 + 4 + c_k // 2  # as far as the band reaches
    expected = banded(convolve_map(full(x, 12), kernel, None), n_out)
    exists = banded(torch.ones(1, 1, 9, 12), n_out)  # beyond the first key a band has entries, a map none
    got = mta_band.convolve_band(x * banded(torch.ones(1, 1, 9, 12), 4), kernel, n_out, None)
    torch.testing.assert_close(got * exists, expected)


def test_expanded_keys_give_the_far_logits():
    """The sum over lags of shifted queries by expanded keys is the convolution of the masked scores, far enough off."""
    (c_q, c_k), T = (3, 5), 90
    q, k, kernel = randn(1, 4, T, 3), randn(1, 2, T, 3), randn(4, c_q, c_k)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).tril()
    expected = convolve_map(scores, kernel, None)
    keys = mta_band.expand_lags(k, kernel, None)
    queries = mta_band.shift_rows(q, c_q, None)
    got = torch.einsum("bhiad,bhjad->bhij", queries, keys)
    offset = -(c_q - 1 + c_k // 2)
    torch.testing.assert_close(got.tril(offset), expected.tril(offset))
    assert not torch.allclose(got.tril(offset + 1), expected.tril(offset + 1))


def test_expanded_values_give_the_far_outputs():
    (c_q, c_k), T = (3, 5), 90
    weights, v, kernel = (
        torch.rand(1, 2, T, T, dtype=torch.float64).tril(-(c_k // 2)),
        randn(1, 2, T, 3),
        randn(2, c_q, c_k),
    )
    expected = convolve_map(weights, kernel, None).tril() @ v
    values = mta_band.expand_lags(v, kernel.flip(2), None)
    got = mta_band.add_lags(torch.einsum("bhij,bhjad->bhiad", weights, values), None)
    torch.testing.assert_close(got, expected)


def test_segments_bound_lags_and_offsets():
    segments = torch.tensor([[0, 0, 1, 1, 1, -1]])
    back = mta_band.same_segment(segments, 4, 3)[0].int().tolist()  # rows 2 to 5; 0, 1 and 2 positions back
    assert back == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
    k, kernel = randn(1, 1, 6, 2), randn(1, 2, 3)
    expanded = mta_band.expand_lags(k, kernel, segments)
    alone = mta_band.expand_lags(k[:, :, 2:5], kernel, None)
    torch.testing.assert_close(expanded[:, :, 2:5], alone)
