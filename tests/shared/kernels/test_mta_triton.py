"""The Triton paths against the float64 reference: through the interpreter on a CPU, compiled on a GPU.

The interpreter has no bf16 products, so that on a CPU half precision is fp16's.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from shared.kernels import head_norm_gate, mta_attention

KQ = [("kq_pre",), ("kq_post",), ("kq_pre", "kq_post")]
HEADS = [("head_pre",), ("head_post",), ("head_pre", "head_post")]
ALL = ("kq_pre", "kq_post", "head_pre", "head_post")
SEGMENTS = torch.tensor([[0] * 3 + [4] * 22 + [5] * 15, [-1] * 5 + [0] * 34 + [-1]])
# Largest error allowed relative to the largest entry.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def check(x, device, dtype=torch.float32):
    """Output and gradients for inputs rounded to dtype; the learned kernels stay fp32, as in training."""
    low = x.to(dtype, kernels=torch.float32, device=device)
    expected = low.to(torch.float64, device=device).run("reference")
    for name, got in low.run("triton").items():
        got, want = got.double(), expected[name]
        assert got.isfinite().all(), name
        assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("names", [(), *KQ], ids="+".join)
def test_key_query_kernels(case, names, device, triton_tiles):
    check(case(names, B=1, H=2, G=1, T=40, D=16), device)


def test_key_query_kernels_of_one_sided_shapes(case, device, triton_tiles):
    check(case(("kq_pre", "kq_post"), B=1, H=2, G=2, T=33, D=10, pre=(1, 7), post=(4, 1)), device)
    check(case(("kq_pre", "kq_post"), B=1, H=2, G=1, T=35, D=4, pre=(5, 1), post=(1, 9)), device)


@pytest.mark.parametrize("names", [KQ[2], HEADS[2], ALL], ids="+".join)
def test_documents_and_padding(case, names, device, triton_tiles):
    x = case(names, H=2, G=1, T=40, groups=1, segment_ids=SEGMENTS)
    check(x, device)
    here = SEGMENTS[0] == 4
    alone = mta_attention(*(t[:1, :, here] for t in x.qkv), **x.kernels)
    got = x.to(torch.float32, device=device).output("triton")[:1, :, here].cpu()
    torch.testing.assert_close(got.double(), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [KQ[2], HEADS[2], ALL], ids="+".join)
def test_fewer_queries_than_keys(case, names, device, triton_tiles):
    check(case(names, B=1, H=2, G=1, T=7, S=40, groups=1), device)
    check(case(names, H=2, G=1, T=7, S=40, groups=1, segment_ids=SEGMENTS), device)


@pytest.mark.parametrize("T", [1, 2, 3, 6, 7, 8, 9, 15, 16, 17, 26, 64])
def test_band_and_far_keys_share_a_softmax(case, T, device, triton_tiles):
    """From lengths without any far key, of which the 8th has the first, to several tiles of them; T < c_k."""
    check(case(("kq_pre", "kq_post"), B=1, H=1, G=1, T=T, pre=(4, 9), post=(3, 7)), device)


@pytest.mark.parametrize("names", HEADS, ids="+".join)
def test_head_mixing(case, names, device, triton_tiles):
    check(case(names, B=1, T=40), device)


def test_head_mixing_of_an_odd_number_of_heads_with_wide_values(case, device, triton_tiles):
    x = case(HEADS[2], B=1, H=3, G=3, T=25, groups=1)
    x.qkv = (*x.qkv[:2], torch.randn(1, 3, 25, 5, dtype=torch.float64))
    check(x, device)


@pytest.mark.parametrize("names", [ALL, ("kq_pre", "head_post"), ("kq_post", "head_pre")], ids="+".join)
def test_everything(case, names, device, triton_tiles):
    check(case(names, B=1, H=2, G=1, T=36, pre=(3, 5), post=(4, 7), groups=1), device)


@pytest.mark.parametrize("names", [KQ[2], HEADS[2], ALL], ids="+".join)
def test_half_precision(case, names, device, triton_tiles):
    x = case(names, B=1, H=2, G=1, T=36, D=16, groups=1)
    check(x, device, torch.bfloat16 if device == "cuda" else torch.float16)


@pytest.mark.parametrize("names", [x for n in range(5) for x in itertools.combinations(ALL, n)], ids="+".join)
def test_the_future_does_not_reach_the_past(case, names, device, triton_tiles):
    t = 17
    x, y = (case(names, B=1, H=2, G=1, T=30, groups=1).to(torch.float32, device=device) for _ in range(2))
    for tensor in y.qkv:
        tensor[:, :, t:] += 3
    before, after = x.output("triton"), y.output("triton")
    # A convolution after the softmax is a difference of no large numbers: nothing of the future remains by rounding.
    torch.testing.assert_close(after[:, :, :t], before[:, :, :t], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[:, :, t:], before[:, :, t:], atol=1e-3)


def test_identity_kernels_are_plain_attention(case, device, triton_tiles):
    x = case(T=36, B=1, D=16).to(torch.float32, device=device)
    identity = torch.zeros(4, 3, 5, device=device)
    identity[:, -1, 2] = 1
    expected = F.scaled_dot_product_attention(*x.qkv, is_causal=True, enable_gqa=True)
    eye = torch.eye(4, device=device)
    for kernels in ({"kq_pre": identity, "kq_post": identity}, {"head_pre": eye, "head_post": eye[None]}):
        got = mta_attention(*x.qkv, **kernels, backend="triton")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_takes_the_path_that_has_it(case, device, triton_tiles):
    """Linear in v: for one seed the output is the product of v and its gradient."""
    x = case(("kq_pre",), B=1, H=2, G=1, T=36).to(torch.float32, device=device)
    v = x.qkv[2].clone().requires_grad_()
    torch.manual_seed(3)
    o = mta_attention(*x.qkv[:2], v, **x.kernels, dropout_p=0.5, backend="triton")
    (dv,) = torch.autograd.grad(o.sum(), v)
    torch.testing.assert_close((dv * v).sum(), o.sum(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(o, x.output("triton"), atol=1e-2)


def test_what_triton_has_not_is_named(case):
    with pytest.raises(ValueError, match="float64"):
        case().output("triton")
    with pytest.raises(ValueError, match="at most 128 channels"):
        case(D=136).to(torch.float32).output("triton")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("D", [24, 32])
def test_norm_and_gate(D, gated, device, triton_tiles):
    names = ["o", "weight", "gate_weight", "gate_bias"][: 4 if gated else 2]
    shapes = {"o": (2, 3, 11, D), "weight": (D,), "gate_weight": (D,), "gate_bias": ()}
    inputs = [torch.randn(shapes[name], device=device) for name in names]
    grad = torch.randn(2, 3, 11, D, device=device)

    def run(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        o = head_norm_gate(*leaves, eps=1e-3, scale=0.7, backend=backend)
        return [o, *torch.autograd.grad(o, leaves, grad.to(dtype))]

    for got, expected in zip(run("triton", torch.float32), run("reference", torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [32, 64, 96, 128])
@pytest.mark.parametrize("names", [*KQ, HEADS[2], ALL], ids="+".join)
def test_full_size_tiles_on_a_gpu(case, names, D, dtype):
    x = case(names, H=4, G=2, T=700, D=D, pre=(6, 11), post=(6, 11))
    check(x, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("names", [KQ[2], HEADS[2], ALL], ids="+".join)
def test_every_length_to_64_on_a_gpu(case, names):
    for T in range(1, 65):
        check(case(names, T=T, D=32, pre=(6, 11), post=(6, 11)), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("names", [*KQ, HEADS[2], ALL], ids="+".join)
def test_every_run_on_a_gpu_gives_the_same_bits(case, names):
    x = case(names, H=8, G=8, T=1000, D=64, pre=(6, 11), post=(6, 11)).to(torch.bfloat16, device="cuda")
    first, second = x.run("auto"), x.run("auto")
    assert all(torch.equal(first[name], second[name]) for name in first)
