"""Norm and gate against the equation in scalars, and finite differences."""

import math

import pytest
import torch

from shared.kernels import head_norm_gate


def test_equation():
    o, weight, gate = [3.0, -1.0, 2.0, 0.5], [1.0, 2.0, -1.0, 0.5], [0.1, -0.2, 0.3, 0.4]
    rms = math.sqrt(sum(x * x for x in o) / 4 + 1e-5)
    n = [0.8 * x / rms * w for x, w in zip(o, weight, strict=True)]
    sigmoid = 1 / (1 + math.exp(-(sum(x * g for x, g in zip(n, gate, strict=True)) + 0.25)))
    o, weight, gate = (torch.tensor(x, dtype=torch.float64) for x in (o, weight, gate))
    bias = torch.tensor(0.25, dtype=torch.float64)
    got = head_norm_gate(o.view(1, 1, 1, 4), weight, gate, bias, eps=1e-5, scale=0.8)
    torch.testing.assert_close(got.flatten(), torch.tensor(n, dtype=torch.float64) * sigmoid)
    ungated = head_norm_gate(o.view(1, 1, 1, 4), weight, eps=1e-5, scale=0.8)
    torch.testing.assert_close(ungated.flatten(), torch.tensor(n, dtype=torch.float64))
    unbiased = head_norm_gate(o.view(1, 1, 1, 4), weight, gate, torch.zeros(()).double(), scale=0.8)
    assert torch.equal(head_norm_gate(o.view(1, 1, 1, 4), weight, gate, scale=0.8), unbiased)


def test_tokens_and_heads_are_normalised_by_themselves():
    o = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    weight, gate, bias = torch.randn(8).double(), torch.randn(8).double(), torch.randn(()).double()
    whole = head_norm_gate(o, weight, gate, bias)
    one = head_norm_gate(o[1:, 2:, 4:], weight, gate, bias)
    torch.testing.assert_close(whole[1:, 2:, 4:], one)


def test_gradients_are_those_of_finite_differences():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 3, 4), (4,), (4,), ())]
    assert torch.autograd.gradcheck(lambda *x: head_norm_gate(*x, eps=1e-3, scale=0.6), inputs)


def test_half_precision_is_computed_in_single():
    """Squares of 300 overflow fp16."""
    o = 300 * torch.ones(1, 1, 1, 4, dtype=torch.float16)
    assert head_norm_gate(o, torch.ones(4)).tolist() == [[[[1.0] * 4]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_D": torch.ones(3)}, "weight_D has shape"),
        ({"gate_weight": torch.ones(3)}, "gate_weight has shape"),
        ({"gate_bias": torch.zeros(())}, "beside a gate_weight"),
        ({"gate_weight": torch.ones(4), "gate_bias": torch.zeros(4)}, "one number"),
        ({"backend": "fast"}, "unknown backend"),
        ({"backend": "triton"}, "no float64"),
    ],
)
def test_wrong_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        head_norm_gate(**({"o_BHTD": torch.ones(1, 1, 1, 4).double(), "weight_D": torch.ones(4)} | options))
