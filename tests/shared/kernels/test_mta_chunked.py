"""Blocks of rows give what the whole map gives, in less memory."""

import itertools
import subprocess
import sys

import pytest
import torch

from shared.kernels import mta_chunked
from shared.kernels.mta_reference import convolve_map

SWITCHES = ("kq_pre", "kq_post", "head_pre", "head_post")
COMBINATIONS = [names for n in range(5) for names in itertools.combinations(SWITCHES, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_blocks_equal_the_whole(case, names, small_blocks):
    segments = torch.tensor([[0] * 4 + [5] * 9 + [6] * 7, [-1] * 3 + [0] * 16 + [-1]])
    for options in ({}, {"segment_ids": segments}):
        for T in (20, 8):
            x = case(names, T=T, S=20, D=4, pre=(4, 5), post=(2, 19), **options)
            got, expected = x.run("chunked"), x.run("reference")
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (6, 11), (3, 17), (1, 19), (5, 33)])
def test_convolution_by_panels_of_columns(shape):
    """Kernels wider than a panel, maps narrower than one, rows that end above the kernel's reach."""
    for rows, cols in ((7, 40), (2, 16), (1, 3)):
        x = torch.randn(2, 3, rows, cols, dtype=torch.float64)
        kernel = torch.randn(3, *shape, dtype=torch.float64)
        whole = convolve_map(x, kernel, None)
        torch.testing.assert_close(mta_chunked.convolve_rows(x, kernel, shape[0] - 1), whole)
        above = min(shape[0] - 1, rows - 1)  # as many rows given that this many fewer are imagined
        torch.testing.assert_close(mta_chunked.convolve_rows(x, kernel, shape[0] - 1 - above), whole[:, :, above:])


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_hidden_may_be_infinite_or_nan(case, names, dtype, small_blocks):
    """A key's products overflow with all queries but those that see it: the last, or those of its own document."""
    segments = torch.tensor([[0] * 4 + [5] * 9])
    large = torch.finfo(dtype).max / 8
    for options, key, seeing in (({}, 12, slice(12, 13)), ({"segment_ids": segments}, 1, slice(4))):
        x = case(names, B=1, T=13, D=4, **options)
        q, k, v = (0.1 * tensor for tensor in x.qkv)
        k[..., :2], q[..., :2] = 0, 100
        q[:, :, seeing, :2] = 0
        k[:, :, key, 0] = large  # infinite
        k[:, ::2, key, 1] = -3 * large  # minus infinity in float16, inf - inf = NaN in float32
        x = type(x)((q, k, v), x.kernels, x.options).to(dtype)
        scores = x.qkv[0] @ x.qkv[1].repeat_interleave(2, dim=1).mT
        assert (~scores.isfinite()).sum() == 4 * (13 - len(range(13)[seeing]))
        got, expected = x.run("chunked"), x.run("reference")
        assert all(tensor.isfinite().all() for tensor in expected.values())
        tolerance = 3e-2 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_filled_is_masked_fill():
    x = torch.tensor([[1.0, torch.inf, torch.nan, -torch.inf, -0.0], [2, 3, -4, 5, 6]], dtype=torch.float64)
    where = torch.tensor([[False, True, True, True, False], [True, False, False, True, False]])
    for dtype, value in itertools.product((torch.float32, torch.float64), (0.0, -torch.inf, 2.5)):
        heads = x.to(dtype).expand(3, 2, 5).clone().requires_grad_()
        got, expected = mta_chunked.filled(heads, where, value), heads.masked_fill(where, value)
        assert torch.equal(got, expected)
        grads = torch.full_like(got, torch.inf)
        assert torch.equal(*(torch.autograd.grad(y, heads, grads, retain_graph=True)[0] for y in (got, expected)))


def test_frozen_inputs_get_no_gradient(case, small_blocks):
    x = case(SWITCHES)
    q, k, v = (t.clone() for t in x.qkv)
    kq_pre = x.kernels["kq_pre"].requires_grad_()
    v.requires_grad_()
    from shared.kernels import mta_attention

    mta_attention(q, k, v, **(x.kernels | {"kq_pre": kq_pre})).sum().backward()
    assert v.grad is not None
    assert kq_pre.grad is not None
    assert q.grad is None


PEAK = """
import re, sys, torch
torch.set_num_threads(1)
def peak():  # not getrusage: its peak of a child process begins at what its parent had
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
from shared.kernels import mta_attention
backend, T = sys.argv[1], int(sys.argv[2])
def attend(T):
    q, k, v = (torch.randn(1, 2, T, 16, requires_grad=True) for _ in range(3))
    kernels = {"kq_pre": torch.randn(2, 3, 5), "kq_post": torch.randn(2, 3, 5), "head_pre": torch.randn(2, 2)}
    mta_attention(q, k, v, **kernels, backend=backend).sum().backward()
attend(64)
before = peak()
attend(T)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_grows_with_the_length_not_its_square():
    def peak_kb(backend, T):
        command = [sys.executable, "-c", PEAK, backend, str(T)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak_kb("chunked", 1024) < 0.5 * peak_kb("reference", 1024)
    assert peak_kb("chunked", 4096) < 3 * peak_kb("chunked", 2048)
