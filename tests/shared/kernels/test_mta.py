"""The definition of truth against loops over the equations, torch's own attention, and its invariances."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from shared.kernels import mta_attention

SWITCHES = ("kq_pre", "kq_post", "head_pre", "head_post")
COMBINATIONS = [names for n in range(5) for names in itertools.combinations(SWITCHES, n)]
BACKENDS = ("reference", "chunked")


def loops(case) -> torch.Tensor:
    """The equations entry by entry; query rows that are not given, other segments and padding contribute nothing."""
    (q, k, _), kernels = ([x.tolist() for x in case.qkv], {name: x.tolist() for name, x in case.kernels.items()})
    B, H, T, S, D = len(q), len(q[0]), len(q[0][0]), len(k[0][0]), len(q[0][0][0])
    offset, heads_per_key = S - T, H // len(k[0])
    segments = case.options.get("segment_ids", torch.zeros(B, S)).tolist()
    output = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        segment = segments[b]

        def visible(i, j, segment=segment):
            return offset <= i < S and 0 <= j <= i and segment[i] == segment[j] and segment[i] >= 0

        def convolve(x, kernel, i, j, segment=segment, visible=visible):
            c_q, c_k = len(kernel), len(kernel[0])
            taps = itertools.product(range(c_q), range(-(c_k // 2), c_k // 2 + 1))
            return sum(
                kernel[c_q - 1 - a][o + c_k // 2] * x[i - a, j + o]
                for a, o in taps
                if visible(i - a, j + o) and segment[i - a] == segment[i]
            )

        places = [(i, j) for i in range(offset, S) for j in range(i + 1) if visible(i, j)]
        maps = []
        for h in range(H):
            key = k[b][h // heads_per_key]
            maps.append(
                {(i, j): sum(map(lambda x, y: x * y, q[b][h][i - offset], key[j])) / math.sqrt(D) for i, j in places}
            )
        if "kq_pre" in kernels:
            maps = [{(i, j): convolve(x, kernels["kq_pre"][h], i, j) for i, j in places} for h, x in enumerate(maps)]
        if "head_pre" in kernels:
            maps = [
                {p: sum(w * x[p] for w, x in zip(kernels["head_pre"][g], maps, strict=True)) for p in places}
                for g in range(H)
            ]
        for x in maps:
            total = {}
            for i, j in places:
                total[i] = total.get(i, 0.0) + math.exp(x[i, j])
            for i, j in places:
                x[i, j] = math.exp(x[i, j]) / total[i]
        if "kq_post" in kernels:
            maps = [{(i, j): convolve(x, kernels["kq_post"][h], i, j) for i, j in places} for h, x in enumerate(maps)]
        if "head_post" in kernels:
            size = len(kernels["head_post"][0])
            maps = [
                {
                    p: sum(
                        kernels["head_post"][m // size][h][m % size] * maps[m // size * size + h][p]
                        for h in range(size)
                    )
                    for p in places
                }
                for m in range(H)
            ]
        for h in range(H):
            for i, j in places:
                output[b, h, i - offset] += maps[h][i, j] * case.qkv[2][b, h // heads_per_key, j]
    return output


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_reference_is_the_equations(case, names):
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 4, 4, 4, 4, -1]])
    for options in ({}, {"segment_ids": segments}):
        for T in (7, 4):
            x = case(names, T=T, S=7, D=3, pre=(3, 3), post=(2, 5), **options)
            torch.testing.assert_close(x.output("reference"), loops(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_kernels_are_plain_attention(case, backend):
    x = case(SWITCHES, T=9, S=13)
    kernels = {
        name: torch.eye(kernel.shape[-1]).expand(kernel.shape) for name, kernel in x.kernels.items() if name[0] == "h"
    }
    for name in ("kq_pre", "kq_post"):
        kernels[name] = torch.zeros_like(x.kernels[name])
        kernels[name][:, -1, kernels[name].shape[2] // 2] = 1
    mask = torch.ones(9, 13, dtype=torch.bool).tril(13 - 9)
    expected = F.scaled_dot_product_attention(*x.qkv, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(mta_attention(*x.qkv, **kernels, backend=backend), expected)
    torch.testing.assert_close(mta_attention(*x.qkv, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_the_future_does_not_reach_the_past(case, names, backend):
    t = 7
    x, y = case(names), case(names)
    for tensor in y.qkv:
        tensor[:, :, t:] = 10 * torch.randn(tensor[:, :, t:].shape, dtype=tensor.dtype)
    before, after = x.output(backend), y.output(backend)
    torch.testing.assert_close(after[:, :, :t], before[:, :, :t], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_packed_and_padded_documents_are_as_if_alone(case, names, backend):
    """Documents of 5, 1 and 6 positions, padding on the left, between and on the right; wide kernels reach across."""
    segments = torch.tensor([[-1, -1, 3, 3, 3, 3, 3, 8, -1, 2, 2, 2, 2, 2, 2, -1]])
    x = case(names, B=1, T=16, pre=(4, 7), post=(3, 5), segment_ids=segments)
    output = x.output(backend)
    assert (output[:, :, segments[0] < 0] == 0).all()
    for document in (3, 8, 2):
        here = segments[0] == document
        alone = mta_attention(*(tensor[:, :, here] for tensor in x.qkv), **x.kernels, backend=backend)
        torch.testing.assert_close(output[:, :, here], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_rows_can_be_had_alone(case, backend):
    """Decoding: given the queries that both convolutions look back on, the last row is that of the whole sequence."""
    x = case(SWITCHES, T=12, pre=(3, 5), post=(2, 3))
    q, k, v = x.qkv
    whole = x.output(backend)
    window = 1 + (3 - 1) + (2 - 1)
    last = mta_attention(q[:, :, -window:], k, v, **x.kernels, backend=backend)[:, :, -1:]
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-12, atol=1e-12)
    short = mta_attention(q[:, :, 1 - window :], k, v, **x.kernels, backend=backend)[:, :, -1:]
    assert not torch.allclose(short, whole[:, :, -1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(case, backend, small_blocks):
    segments = torch.tensor([[0, 0, 1, 1, 1, 1]])
    x = case(SWITCHES, B=1, H=2, G=1, T=5, S=6, D=2, pre=(2, 3), post=(2, 3), groups=1, segment_ids=segments)

    def attend(q, k, v, *kernels):
        names = dict(zip(SWITCHES, kernels, strict=True))
        return mta_attention(q, k, v, **names, segment_ids=segments, backend=backend)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in (*x.qkv, *x.kernels.values())])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean(case, backend):
    x = case(SWITCHES, B=1)
    without = x.output(backend)
    many = [tensor.expand(600, -1, -1, -1) for tensor in x.qkv]
    torch.manual_seed(0)
    mean = mta_attention(*many, **x.kernels, dropout_p=0.3, backend=backend).mean(0, keepdim=True)
    # The standard error is about 4% of the outputs' size.
    assert (mean - without).norm() < 0.1 * without.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_drops_what_forward_dropped(case, backend, small_blocks):
    """The output is linear in v: for one seed it is the product of v and its gradient."""
    x = case(SWITCHES, B=2, dropout_p=0.3)
    v = x.qkv[2].clone().requires_grad_()
    torch.manual_seed(3)
    o = mta_attention(*x.qkv[:2], v, **x.kernels, dropout_p=0.3, backend=backend)
    (dv,) = torch.autograd.grad(o.sum(), v)
    torch.testing.assert_close((dv * v).sum(), o.sum())
    torch.manual_seed(3)
    assert torch.equal(x.output(backend), o)
    assert not torch.equal(x.output(backend), o)


def test_half_precision_is_close(case):
    for backend in BACKENDS:
        x = case(SWITCHES, T=40)
        low = x.to(torch.bfloat16)
        error = (low.output(backend).double() - low.to(torch.float64).output("reference")).norm()
        assert error < 2e-2 * x.output("reference").norm()
        assert low.output(backend).dtype == torch.bfloat16


def test_autocast_does_not_change_the_maps(case):
    x = case(SWITCHES).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = x.output("auto")
    assert torch.equal(inside, x.output("auto"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_BGSD": torch.zeros(2, 2, 12, 7)}, "k must share q's batch and channels"),
        ({"v_BGSD": torch.zeros(2, 2, 11, 8)}, "v k's batch, heads and positions"),
        (
            {"k_BGSD": torch.zeros(2, 3, 12, 8), "v_BGSD": torch.zeros(2, 3, 12, 8)},
            "4 query heads are not a multiple of 3",
        ),
        ({"k_BGSD": torch.zeros(2, 2, 9, 8), "v_BGSD": torch.zeros(2, 2, 9, 8)}, "12 queries for 9 keys"),
        ({"q_BHTD": torch.zeros(4, 12, 8)}, "q_BHTD has 3 axes"),
        ({"v_BGSD": torch.zeros(2, 2, 12, 8, dtype=torch.float64)}, "one floating point dtype"),
        ({"kq_pre": torch.zeros(4, 3, 4)}, "kq_pre has shape .4, 3, 4.; it needs .4 heads, c_q, c_k. with c_k odd"),
        ({"kq_post": torch.zeros(2, 3, 5)}, "kq_post has shape"),
        ({"head_pre": torch.zeros(2, 2)}, r"it needs \(4, 4\)"),
        ({"head_post": torch.zeros(2, 4, 4)}, r"groups \* c_h = 4"),
        ({"segment_ids": torch.zeros(2, 11, dtype=torch.int64)}, r"it needs \(2, 12\) of int32 or int64"),
        ({"segment_ids": torch.ones(2, 12, dtype=torch.bool)}, "torch.bool"),
        ({"dropout_p": 1.0}, "outside"),
        ({"backend": "fast"}, "unknown backend 'fast'; valid: auto, reference, chunked, triton"),
    ],
)
def test_wrong_input_is_named(change, message):
    good = {"q_BHTD": torch.zeros(2, 4, 12, 8), "k_BGSD": torch.zeros(2, 2, 12, 8), "v_BGSD": torch.zeros(2, 2, 12, 8)}
    with pytest.raises(ValueError, match=message):
        mta_attention(**(good | change))
