import math

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config():
    """A config small enough to run anything on: 2 layers, 4 heads, 2 key-value heads, small kernels in both layers."""
    from papers.mta.model import MTAConfig

    def make(**changes):
        sizes = {
            "vocab_size": 37,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "query_kernel_size": 3,
            "key_kernel_size": 5,
            "kq_layers": [0, 1],
            "head_group_size": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return MTAConfig(**{**sizes, **changes})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """A float64 model in evaluation mode with random kernels, norms and gates: nothing is the identity."""
    from papers.mta.model import MTAForCausalLM

    def make(**changes):
        model = MTAForCausalLM(tiny_config(**changes)).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "kernels." in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif any(word in name for word in ("norm_weight", "gate", "lambda")):
                    parameter.add_(0.5 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def literal_attention():
    """The equations, one number at a time, for one sequence: q (H, T, D), k and v (H, T, D), kernels by name."""

    def convolve(kernel_HUW, map_HTT):
        T = map_HTT.shape[1]
        out = torch.zeros_like(map_HTT)
        c_q, c_k = kernel_HUW.shape[1:]
        for i in range(T):
            for j in range(T):
                for u in range(c_q):
                    for w in range(c_k):
                        query, key = i - (c_q - 1 - u), j + w - (c_k - 1) // 2
                        if query >= 0 and 0 <= key <= query:
                            out[:, i, j] += kernel_HUW[:, u, w] * map_HTT[:, query, key]
        return out

    def attention(q, k, v, kernels):
        H, T, D = q.shape
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        logits = q @ k.transpose(1, 2) / math.sqrt(D)
        if "kq_pre" in kernels:
            logits = convolve(kernels["kq_pre"], logits)
        if "head_pre" in kernels:
            logits = torch.stack([sum(kernels["head_pre"][g, h] * logits[h] for h in range(H)) for g in range(H)])
        weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
        if "kq_post" in kernels:
            weights = convolve(kernels["kq_post"], weights).masked_fill(~causal, 0.0)
        if "head_post" in kernels:
            mixer = kernels["head_post"]
            size = mixer.shape[1]
            weights = torch.stack(
                [
                    sum(mixer[m // size, h, m % size] * weights[m // size * size + h] for h in range(size))
                    for m in range(H)
                ]
            )
        return weights, weights @ v

    return attention
