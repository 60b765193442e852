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
