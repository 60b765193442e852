import itertools
import math

import pytest
import torch

SWITCHES = [dict(zip(("kq_pre", "kq_post", "head_pre", "head_post"), on, strict=True)) for on in itertools.product(
    (False, True), repeat=4
)]  # fmt: skip
KINDS = [{"attention": kind} for kind in ("transformer", "diff", "talking_heads", "mta")]


def name(changes):
    return "-".join(f"{k}={v}" if not isinstance(v, bool) else k for k, v in changes.items() if v) or "plain"


def tokens(*shape):
    return torch.randint(3, 37, shape)


# ---- size ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("attention", "parameters"),
    # Table 8 of the paper
    [("transformer", 876_553_728), ("diff", 876_567_552), ("talking_heads", 876_566_016), ("mta", 876_583_320)],
)
def test_parameter_count_of_the_880m_models(attention, parameters):
    from papers.mta.model import MTAConfig, MTAForCausalLM

    with torch.device("meta"):
        model = MTAForCausalLM(MTAConfig(attention=attention))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("sizes", "kq_layers"),
    [
        ({"num_hidden_layers": 20}, [2, 6, 10, 14, 18]),
        ({"num_hidden_layers": 24}, [2, 6, 10, 14, 18, 22]),
    ],
)
def test_key_query_kernels_are_in_every_fourth_layer_and_head_mixing_in_all(sizes, kq_layers):
    from papers.mta.model import MTAConfig

    config = MTAConfig(**sizes)
    shapes = [config.kernel_shapes(layer) for layer in range(config.num_hidden_layers)]
    assert [layer for layer, s in enumerate(shapes) if "kq_pre" in s] == kq_layers
    assert [layer for layer, s in enumerate(shapes) if "kq_post" in s] == kq_layers
    assert all(s["head_pre"] == (16, 16) and s["head_post"] == (1, 16, 16) for s in shapes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"key_kernel_size": 4}, "odd"),
        ({"query_kernel_size": 0}, "positive"),
        ({"kq_layers": [1, 2]}, r"kq_layers \[2\] do not exist"),
        ({"head_group_size": 3}, "head_group_size=3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"attention": "diff", "num_key_value_heads": 1}, "even"),
        ({"eval_dropout": True}, "eval_dropout"),
        ({"attention": "linear"}, "linear"),
        ({"head_norm": "batch"}, "batch"),
    ],
)
def test_contradictory_configs_are_refused(tiny_config, changes, complaint):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises((ValueError, StrictDataclassError), match=complaint):
        tiny_config(**changes)


# ---- the equations ---------------------------------------------------------------------------------------------------
def head_norm(o, attention, kind, layer):
    """RMS norm of each head and what follows it, written out."""
    if kind == "none":
        return o
    normed = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * attention.norm_weight
    if kind == "depth":
        return normed * (1 - (0.8 - 0.6 * math.exp(-0.3 * layer)))
    if kind == "layernorm_scaling":
        return normed / math.sqrt(layer + 1)
    if kind == "gate":
        return normed * torch.sigmoid((normed * attention.gate_weight).sum(-1, keepdim=True) + attention.gate_bias)
    return normed


def project(model, attention, x_TE):
    """Queries, keys (H or G, T, D) with positions, and values as projected (T, G D)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    T = len(x_TE)
    positions = model.model.rotary_emb(x_TE[None], torch.arange(T)[None])
    q, k = (f(x_TE).view(T, -1, attention.head_dim).transpose(0, 1)[None] for f in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *positions)
    return q[0], k[0], attention.v_proj(x_TE), positions


@pytest.mark.parametrize(
    "changes",
    [
        {"head_norm": "none", **switches} for switches in SWITCHES if any(switches.values())
    ] + [{"head_norm": kind} for kind in ("no_scaling", "depth", "layernorm_scaling", "gate")]
    + [{"attention": "talking_heads"}, {"attention": "transformer"}],
    ids=name,
)  # fmt: skip
@torch.no_grad()
def test_layer_computes_the_equations(tiny_model, literal_attention, changes):
    model = tiny_model(**changes)
    layer, T = 1, 7
    attention = model.model.layers[layer].self_attn
    x_TE = torch.randn(T, 32, dtype=torch.double)
    q, k, v, positions = project(model, attention, x_TE)
    k = k.repeat_interleave(2, dim=0)
    v = v.view(T, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)
    weights, o = literal_attention(q, k, v, dict(attention.kernels))
    kind = model.config.head_norm if model.config.attention == "mta" else "none"
    expected = attention.o_proj(head_norm(o, attention, kind, layer).transpose(0, 1).reshape(T, -1))

    actual, maps = attention(x_TE[None], position_embeddings=positions, output_attentions=True)
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(maps[0], weights, rtol=0, atol=1e-10)


@torch.no_grad()
def test_diff_layer_subtracts_two_maps_that_share_values(tiny_model, literal_attention):
    model = tiny_model(attention="diff", num_attention_heads=8, num_key_value_heads=4)
    layer, T, D = 1, 7, 4
    attention = model.model.layers[layer].self_attn
    x_TE = torch.randn(T, 32, dtype=torch.double)
    q, k, v, positions = project(model, attention, x_TE)
    v = v.view(T, 2, 2 * D)
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    q1, q2, k1, k2 = *attention.lambda_q, *attention.lambda_k
    lambda_ = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + start
    heads = []
    for head in range(4):  # 4 heads of 2 maps, of the 2 value heads each serves 2
        first, second = (
            literal_attention(q[[m]], k[[n]], v[None, :, head // 2], {})[0][0]
            for m, n in ((head, head // 2), (head + 4, head // 2 + 2))
        )
        o = (first - lambda_ * second) @ v[:, head // 2]
        heads.append((1 - start) * o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * attention.norm_weight)
    expected = attention.o_proj(torch.cat(heads, dim=-1))
    actual, _ = attention(x_TE[None], position_embeddings=positions)
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=2e-6)  # λ is computed in float32


@pytest.mark.parametrize(
    "changes", [*KINDS, *({"head_norm": "gate", **switches} for switches in SWITCHES)], ids=name
)  # fmt: skip
@torch.no_grad()
def test_later_tokens_change_nothing_before_them(tiny_model, changes):
    model = tiny_model(**changes)
    before = tokens(2, 12)
    for t in (0, 3, 10):
        after = before.clone()
        after[:, t + 1 :] = (before[:, t + 1 :] - 2) % 34 + 3
        difference = (model(before).logits - model(after).logits).abs().amax(-1)
        assert difference[:, : t + 1].max() < 1e-12
        assert difference[:, t + 1 :].min() > 1e-6


# ---- documents and padding -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [*KINDS, {"head_norm": "none"}, {"kq_post": False}], ids=name)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(tiny_model, changes, side):
    model = tiny_model(**changes)
    short, long = tokens(1, 6), tokens(1, 10)
    pad = torch.zeros(1, 4, dtype=torch.long)
    order = (pad, short) if side == "left" else (short, pad)
    batch = torch.cat([torch.cat(order, dim=1), long])
    mask = (batch != 0).long()
    logits = model(batch, attention_mask=mask).logits
    real = slice(4, None) if side == "left" else slice(6)
    # Positions of a left-padded row begin at 4; RoPE is relative, but in float32.
    torch.testing.assert_close(logits[:1, real], model(short).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:], model(long).logits, rtol=0, atol=1e-10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("changes", [*KINDS, {"kq_pre": False}, {"kq_post": False}], ids=name)
@pytest.mark.parametrize("told_by", ["position_ids", "segment_ids"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(tiny_model, changes, told_by):
    model = tiny_model(**changes)
    documents = [tokens(1, n) for n in (5, 1, 7)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    if told_by == "position_ids":
        hints = {"position_ids": positions}
    else:
        segments = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)], dim=1)
        hints = {"position_ids": positions, "segment_ids": segments}
    expected = torch.cat([model(d).logits for d in documents], dim=1)
    torch.testing.assert_close(model(packed, **hints).logits, expected, rtol=0, atol=1e-10)
    assert (model(packed).logits - expected).abs()[:, 5:].max() > 1e-4, "the documents would interact unpacked"


def test_masks_of_other_shapes_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"\(batch, positions\)"):
        tiny_model()(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


# ---- initialisation --------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_identity_kernels_begin_as_a_transformer(tiny_config):
    from papers.mta.model import MTAForCausalLM

    model = MTAForCausalLM(tiny_config(head_norm="none")).eval()
    plain = MTAForCausalLM(tiny_config(attention="transformer")).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "kernels" not in k})
    x = tokens(2, 12)
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("identity", [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]),
        ("zero", [[0.0] * 5] * 3),
        ("constant", [[0.3] * 5] * 3),
    ],
)
def test_kernel_initialisations(tiny_config, kind, expected):
    from papers.mta.model import MTAForCausalLM

    kernels = MTAForCausalLM(tiny_config(kq_init=kind)).model.layers[0].self_attn.kernels
    for kernel in (kernels["kq_pre"], kernels["kq_post"]):
        torch.testing.assert_close(kernel.detach(), torch.tensor(expected, dtype=torch.float).expand(4, 3, 5))
    torch.testing.assert_close(kernels["head_pre"].detach(), torch.eye(4))
    torch.testing.assert_close(kernels["head_post"].detach(), torch.eye(2).expand(2, 2, 2))


def test_uniform_kernels_fill_minus_one_to_one(tiny_config):
    from papers.mta.model import MTAForCausalLM

    config = tiny_config(kq_init="uniform", query_kernel_size=20, key_kernel_size=21)
    kernel = MTAForCausalLM(config).model.layers[0].self_attn.kernels["kq_pre"]
    assert -1 <= kernel.min() < -0.95
    assert 0.95 < kernel.max() <= 1
    assert abs(kernel.mean()) < 0.1


@pytest.mark.parametrize("changes", KINDS, ids=name)
def test_initialisation_overlooks_no_parameter(tiny_config, changes):
    """The released code leaves the gate's bias as it finds the memory."""
    from papers.mta.model import MTAForCausalLM

    model = MTAForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    for module in model.modules():
        model._init_weights(module)
    assert not [n for n, p in model.named_parameters() if p.isnan().any()]


def test_everything_missing_from_a_checkpoint_is_initialised(tiny_config, tmp_path):
    """from_pretrained builds on the meta device, where an overlooked parameter would be arbitrary memory."""
    from safetensors.torch import load_file, save_file

    from papers.mta.model import MTAForCausalLM

    MTAForCausalLM(tiny_config()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    added = [k for k in weights if any(word in k for word in ("kernels", "norm_weight", "gate_weight", "gate_bias"))]
    assert len(added) == 2 * (4 + 3)
    save_file({k: v for k, v in weights.items() if k not in added}, tmp_path / "model.safetensors", {"format": "pt"})
    for layer in MTAForCausalLM.from_pretrained(tmp_path).model.layers:
        attention = layer.self_attn
        assert attention.gate_bias == 0
        assert (attention.norm_weight == 1).all()
        assert 0 < attention.gate_weight.abs().max() <= 3 * 32**-0.5
        assert attention.kernels["kq_pre"].sum() == 4


def test_weights_begin_as_truncated_normals_of_fan_in(tiny_config):
    from papers.mta.model import MTAForCausalLM

    model = MTAForCausalLM(tiny_config(hidden_size=64, intermediate_size=256, vocab_size=500))
    layer = model.model.layers[0]
    for weight, fan_in in [
        (layer.self_attn.q_proj.weight, 64),
        (layer.mlp.up_proj.weight, 64),
        (layer.mlp.down_proj.weight, 256),
        (model.model.embed_tokens.weight, 64),
    ]:
        std = fan_in**-0.5
        assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.05)  # of a normal cut at 3 sigma
        assert 2.5 * std < weight.abs().max() <= 3 * std


@pytest.mark.parametrize("changes", [*KINDS, {"kq_init": "zero"}], ids=name)
def test_every_parameter_learns(tiny_config, changes):
    """Zero kernels block the gradient of what is before them, until they have learnt a step themselves."""
    from papers.mta.model import MTAForCausalLM

    model = MTAForCausalLM(tiny_config(**changes)).train()
    x = tokens(2, 12)
    for _ in range(4):
        model.zero_grad()
        model(x, labels=x).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    still = [n for n, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert not still


@pytest.mark.parametrize("changes", KINDS, ids=name)
def test_trains_under_autocast(tiny_config, changes):
    from papers.mta.model import MTAForCausalLM

    model = MTAForCausalLM(tiny_config(**changes)).train()
    x = tokens(2, 12)
    exact = model(x, labels=x).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x, labels=x).loss
    rough.backward()
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("changes", KINDS, ids=name)
def test_gradient_checkpointing_changes_no_gradient(tiny_config, changes):
    from papers.mta.model import MTAForCausalLM

    model = MTAForCausalLM(tiny_config(**changes)).train()
    x = torch.cat([torch.nn.functional.pad(tokens(1, 8), (4, 0)), tokens(1, 12)])
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(x, attention_mask=(x != 0).long(), labels=x).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# ---- dropout ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", KINDS, ids=name)
@torch.no_grad()
def test_attention_dropout_is_off_in_evaluation_and_on_in_training(tiny_model, changes):
    model = tiny_model(attention_dropout=0.5, **changes)
    x = tokens(2, 12)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


@torch.no_grad()
def test_eval_dropout_reproduces_the_released_baseline(tiny_model):
    model = tiny_model(attention="transformer", attention_dropout=0.5, eval_dropout=True)
    x = tokens(2, 12)
    assert not torch.equal(model(x).logits, model(x).logits)


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", KINDS, ids=name)
@torch.no_grad()
def test_checkpoints_load_through_the_auto_class(tiny_model, tmp_path, changes):
    from transformers import AutoModelForCausalLM

    model = tiny_model(**changes).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = tokens(2, 9)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_kernels_stay_in_float32_when_the_rest_is_loaded_in_half_precision(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model().float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for n, p in loaded.named_parameters() if "kernels" in n} == {torch.float32}
    assert {p.dtype for n, p in loaded.named_parameters() if "kernels" not in n} == {torch.bfloat16}
    x = tokens(2, 9)
    assert loaded(x, labels=x).loss.isfinite()


# ---- retrofit --------------------------------------------------------------------------------------------------------
@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes):
        config = {
            "vocab_size": 37,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
        }
        return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).double().eval()

    return make


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3_ROPE}, {"attention_bias": True, "head_dim": 16}],
    ids=["untied", "tied", "llama3-rope", "bias-and-head-dim"],
)
@torch.no_grad()
def test_retrofit_computes_what_the_llama_did(llama, tmp_path, changes):
    from papers.mta.model import MTAForCausalLM

    source = llama(**changes)
    source.save_pretrained(tmp_path)
    x = tokens(2, 20)
    for given in (source, str(tmp_path)):
        model = MTAForCausalLM.from_llama(given, kq_layers=[0, 1, 2])
        assert all(len(layer.self_attn.kernels) == 4 for layer in model.model.layers)
        torch.testing.assert_close(model(x).logits, source(x).logits, rtol=0, atol=1e-10)


def test_retrofitted_kernels_learn_and_leave_the_llama_alone(llama):
    from papers.mta.model import MTAForCausalLM

    source = llama()
    before = source.model.layers[0].self_attn.q_proj.weight.clone()
    model = MTAForCausalLM.from_llama(source, head_norm="gate").train()
    x = tokens(2, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model.model.layers[2].self_attn.kernels["kq_pre"][:, -1, 5], torch.ones(4).double())
    assert torch.equal(source.model.layers[0].self_attn.q_proj.weight, before)


@torch.no_grad()
def test_a_trained_baseline_can_be_retrofitted_too(tiny_model):
    from papers.mta.model import MTAForCausalLM

    source = tiny_model(attention="transformer", attention_dropout=0.1)
    model = MTAForCausalLM.from_llama(source, kq_layers=[1])
    x = tokens(2, 12)
    torch.testing.assert_close(model(x).logits, source(x).logits, rtol=0, atol=1e-10)
    assert model.config.attention_dropout == 0.1


def test_retrofit_of_anything_else_is_refused(tiny_model):
    from papers.mta.model import MTAForCausalLM

    with pytest.raises(ValueError, match="not 'diff'"):
        MTAForCausalLM.from_llama(tiny_model(attention="diff"))


def test_incomplete_llamas_are_refused(llama):
    from papers.mta.model import MTAForCausalLM

    source = llama()
    del source.model.layers[1].self_attn.q_proj
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        MTAForCausalLM.from_llama(source)
