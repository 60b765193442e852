"""Llama with its attention replaced: Multi-Token Attention and the three baselines it is compared with.

Importing this module registers `MTAConfig` and `MTAForCausalLM` with the Auto classes. Everything outside attention
(SwiGLU, RMSNorm, RoPE) is transformers' Llama, so the arms of an experiment differ in attention alone:

| attention   | what it is                                                               | parameters added per layer  |
|-------------|--------------------------------------------------------------------------|-----------------------------|
| transformer | softmax attention                                                        | none                        |
| diff        | DIFF Transformer (arXiv 2410.05258): difference of two softmax maps      | 6 D                         |
|talking_heads| heads mixed before and after the softmax (arXiv 2003.02436)              | 2 H²                        |
| mta         | key-query convolution (some layers) and head mixing before and after the | 2 H c_q c_k; H² + H c_h;    |
|             | softmax, then a norm and a gate on each head's output                    | 2 D + 1                     |

Axes: B batch, T query positions, S key positions (S >= T, the queries are the last T), H query heads, G key-value
heads, D head dimension, E model dimension.
"""

import math
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from papers.mta.cache import MTACache
from shared.kernels import head_norm_gate, mta_attention


# ---- configuration --------------------------------------------------------------------------------------------------
@strict
class MTAConfig(LlamaConfig):
    """Size and switches; the defaults are the paper's 880M MTA model.

    Weights begin as in `MTAPreTrainedModel._init_weights`, whatever `initializer_range` says.

    Args (beyond `LlamaConfig`'s):
        intermediate_size: SwiGLU width; None: 8/3 of hidden_size rounded up to a multiple of 256, as in the paper.
        attention: which of the four mechanisms of the module's docstring. `diff` reads num_attention_heads and
            num_key_value_heads as the number of *maps*: half as many heads, with values twice as wide (Table 8 agrees).
        attention_dropout: on the attention weights, in training only.
        eval_dropout: keeps the dropout of `transformer` on in evaluation, as the paper's released baseline does.

    The rest is read by attention="mta" only:
        kq_pre, kq_post: key-query convolution on the logits (Eq. 5), on the weights.
        query_kernel_size, key_kernel_size: c_q current and past queries; c_k keys, centred (odd).
        kq_layers: layers with key-query kernels, from 0; None: every fourth, beginning with the third.
        kq_init: `identity`; or for ablation `zero`, `constant` (0.3), `uniform` (in [-1, 1]). Head mixers always begin
            as the identity: zero ones behind zero kernels get no gradient (which kernels the paper ablates: NOT FOUND).
        head_pre, head_post: head mixing in all layers, on the logits (all heads), on the weights (groups of heads).
        head_group_size: c_h, heads in a group, a divisor of num_attention_heads; None: all heads.
        head_norm: RMS norm of each head's output in all layers. `none`; `no_scaling`; `depth`: times 1 - λ_l;
            `layernorm_scaling`: times 1/sqrt(l), l from 1 (inferred: not in the released code); `gate`: times a
            learned sigmoid, one number per head and token.
    """

    model_type = "mta"
    default_theta = 100_000.0

    vocab_size: int = 128_256
    hidden_size: int = 1536
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 128_000
    eos_token_id: int | list[int] | None = 128_001
    tie_word_embeddings: bool = True

    attention: Literal["transformer", "diff", "talking_heads", "mta"] = "mta"
    eval_dropout: bool = False
    kq_pre: bool = True
    kq_post: bool = True
    query_kernel_size: int = 6
    key_kernel_size: int = 11
    kq_layers: list[int] | None = None
    kq_init: Literal["identity", "zero", "constant", "uniform"] = "identity"
    head_pre: bool = True
    head_post: bool = True
    head_group_size: int | None = None
    head_norm: Literal["none", "no_scaling", "depth", "layernorm_scaling", "gate"] = "gate"

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(self.hidden_size * 8 / 3 / 256)
        if self.kq_layers is None:
            self.kq_layers = list(range(2, self.num_hidden_layers, 4))
        if self.head_group_size is None:
            self.head_group_size = self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_attention(self):
        """Called by @strict; raises ValueError for switches that contradict each other."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        if self.attention == "diff" and (heads % 2 or kv_heads % 2):
            raise ValueError(f"attention='diff' pairs heads: {heads} heads and {kv_heads} key-value heads must be even")
        if self.eval_dropout and self.attention != "transformer":
            raise ValueError("eval_dropout reproduces a fault of the released baseline: attention='transformer' only")
        if self.attention != "mta":
            return
        if self.query_kernel_size < 1 or self.key_kernel_size < 1 or self.key_kernel_size % 2 == 0:
            sizes = f"query_kernel_size={self.query_kernel_size}, key_kernel_size={self.key_kernel_size}"
            raise ValueError(f"{sizes}: both must be positive and the latter odd")
        if outside := [layer for layer in self.kq_layers if not 0 <= layer < self.num_hidden_layers]:
            raise ValueError(f"kq_layers {outside} do not exist: layers are 0..{self.num_hidden_layers - 1}")
        if self.head_group_size < 1 or heads % self.head_group_size:
            raise ValueError(f"head_group_size={self.head_group_size} does not divide num_attention_heads={heads}")

    def kernel_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The learned kernels of a layer, by their `mta_attention` argument; empty where attention is plain."""
        heads, group = self.num_attention_heads, self.head_group_size
        if self.attention == "talking_heads":
            return {"head_pre": (heads, heads), "head_post": (1, heads, heads)}
        if self.attention != "mta":
            return {}
        kq = (heads, self.query_kernel_size, self.key_kernel_size)
        shapes = {
            "kq_pre": kq if self.kq_pre and layer in self.kq_layers else None,
            "kq_post": kq if self.kq_post and layer in self.kq_layers else None,
            "head_pre": (heads, heads) if self.head_pre else None,
            "head_post": (heads // group, group, group) if self.head_post else None,
        }
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def n_cached_queries(self, layer: int) -> int:
        """Past queries that decoding needs: each convolution looks c_q - 1 rows back, and they compose."""
        return (self.query_kernel_size - 1) * sum(name.startswith("kq") for name in self.kernel_shapes(layer))


def lambda_init(layer: int) -> float:
    """λ_l of the DIFF Transformer's initialisation and of MTA's depth scaling 1 - λ_l; `layer` from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


# ---- attention ------------------------------------------------------------------------------------------------------
def causal_mask(segment_ids_BS: torch.Tensor | None, n_queries: int, n_keys: int, device) -> torch.Tensor | None:
    """What the last `n_queries` of `n_keys` positions may attend to, (B or 1, 1, T, S), True: allowed.

    None where torch's own causal flag or no mask at all says the same. Padding attends to itself, lest its rows are
    empty.
    """
    if segment_ids_BS is None and n_queries in (1, n_keys):
        return None
    key_S = torch.arange(n_keys, device=device)
    query_T = key_S[n_keys - n_queries :]
    allowed_TS = key_S <= query_T[:, None]
    if segment_ids_BS is None:
        return allowed_TS[None, None]
    query_BT1 = segment_ids_BS[:, -n_queries:, None]
    same_BTS = (query_BT1 == segment_ids_BS[:, None, :]) & (query_BT1 >= 0)
    return ((same_BTS & allowed_TS) | (key_S == query_T[:, None]))[:, None]


class MTAAttention(LlamaAttention):
    """Multi-Token Attention (Eq. 5 and head mixing); `talking_heads` and `transformer` are this with less."""

    def __init__(self, config: MTAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        shapes = config.kernel_shapes(layer_idx)
        self.kernels = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        norm = config.head_norm if config.attention == "mta" else "none"
        self.norm_scale = {"depth": 1 - lambda_init(layer_idx), "layernorm_scaling": (layer_idx + 1) ** -0.5}.get(
            norm, 1
        )
        self.norm_weight = None if norm == "none" else nn.Parameter(torch.empty(self.head_dim))
        self.gate_weight = nn.Parameter(torch.empty(self.head_dim)) if norm == "gate" else None
        self.gate_bias = nn.Parameter(torch.empty(())) if norm == "gate" else None

    @property
    def uses_sdpa(self) -> bool:
        return not self.kernels

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: MTACache | None = None,
        segment_ids_BS: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the layer's output (B, T, E) and, asked for output_attentions, its values' weights (B, H, T, S)."""
        B, T, _ = hidden_states.shape
        q_BHTD = self.q_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_BGSD = self.k_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        v_BGSD = self.project_values(hidden_states)
        rotated = apply_rotary_pos_emb(q_BHTD, k_BGSD, *position_embeddings)
        q_BHTD, k_BGSD = (x.to(v_BGSD.dtype) for x in rotated)  # under autocast the rotation is in float32
        if past_key_values is not None:
            k_BGSD, v_BGSD = past_key_values.update(k_BGSD, v_BGSD, self.layer_idx)
            q_BHTD = past_key_values.layers[self.layer_idx].extend_queries(q_BHTD)

        masks = {"mask": attention_mask, "segment_ids": segment_ids_BS}
        dropping = self.training or self.config.eval_dropout
        o_BHTD = self.attend(q_BHTD, k_BGSD, v_BGSD, dropout_p=self.attention_dropout if dropping else 0.0, **masks)
        o_BHTD = self.normalise(o_BHTD[:, :, -T:])
        output_BTE = self.o_proj(o_BHTD.transpose(1, 2).reshape(B, T, -1))

        weights_BHTS = None
        if kwargs.get("output_attentions"):
            # Attention is linear in the values: unit vectors as values return the weights.
            unit_BGSS = torch.eye(k_BGSD.shape[2], dtype=v_BGSD.dtype, device=v_BGSD.device)
            unit_BGSS = unit_BGSS.expand(B, v_BGSD.shape[1], -1, -1)
            weights_BHTS = self.attend(q_BHTD, k_BGSD, unit_BGSS, backend="reference", **masks)[:, :, -T:]
        return output_BTE, weights_BHTS

    def project_values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q_BHTD, k_BGSD, v_BGSD, mask, segment_ids, dropout_p=0.0, backend="auto") -> torch.Tensor:
        """Weighs the values; with a cache the first rows of the result lack their past and are to be dropped."""
        if self.uses_sdpa:
            return sdpa(q_BHTD, k_BGSD, v_BGSD, mask, dropout_p, self.scaling)
        return mta_attention(
            q_BHTD,
            k_BGSD,
            v_BGSD,
            **self.kernels,
            segment_ids=segment_ids,
            scale=self.scaling,
            dropout_p=dropout_p,
            backend=backend,
        )

    def normalise(self, o_BHTD: torch.Tensor) -> torch.Tensor:
        """RMS norm over D of each head and token by itself, with its scale or gate; all heads share its weights."""
        if self.norm_weight is None:
            return o_BHTD
        eps = self.config.rms_norm_eps
        return head_norm_gate(
            o_BHTD, self.norm_weight, self.gate_weight, self.gate_bias, eps=eps, scale=self.norm_scale
        )

    @torch.no_grad()
    def init_norm(self) -> None:
        """The norm begins without effect of its own, the gate near 1/2: small weights, bias 0."""
        if self.norm_weight is not None:
            initialization.ones_(self.norm_weight)
        if self.gate_weight is not None:
            std = self.config.hidden_size**-0.5
            initialization.trunc_normal_(self.gate_weight, std=std, a=-3 * std, b=3 * std)
            initialization.zeros_(self.gate_bias)


@torch.no_grad()
def init_kernels(kernels: nn.ParameterDict, kq_init: str) -> None:
    """Identity kernels, with which the maps are plain attention's, or for key-query kernels one of the ablations."""
    for name, kernel in kernels.items():
        if name.startswith("head"):
            initialization.copy_(kernel, torch.eye(kernel.shape[-1], device=kernel.device).expand_as(kernel))
        elif kq_init == "uniform":
            initialization.uniform_(kernel, -1.0, 1.0)
        elif kq_init == "constant":
            initialization.constant_(kernel, 0.3)
        else:
            start = torch.zeros_like(kernel)
            if kq_init == "identity":
                start[:, -1, kernel.shape[-1] // 2] = 1.0  # the current query, the same key
            initialization.copy_(kernel, start)


class DiffAttention(MTAAttention):
    """DIFF Transformer: (softmax(Q1 K1ᵀ) - λ softmax(Q2 K2ᵀ)) V, an RMS norm on each head, times 1 - λ_init.

    The H maps make H/2 heads: map m and map m + H/2 share the values of head m, which are 2 D wide. λ is one number
    per layer, exp(λ_q1·λ_k1) - exp(λ_q2·λ_k2) + λ_init. The parameter count agrees with the paper's Table 8; the
    order of the maps, dropout on both of them and the λ vectors' initial standard deviation of 0.1 are inferred.
    """

    def __init__(self, config: MTAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.lambda_init = lambda_init(layer_idx)
        self.lambda_q = nn.Parameter(torch.empty(2, self.head_dim))
        self.lambda_k = nn.Parameter(torch.empty(2, self.head_dim))
        self.norm_weight = nn.Parameter(torch.empty(2 * self.head_dim))
        self.norm_scale = 1 - self.lambda_init

    def project_values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.v_proj(hidden_states).unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2)

    def attend(self, q_BHTD, k_BGSD, v_BGSD, mask, segment_ids, dropout_p=0.0, backend="auto") -> torch.Tensor:
        v_BGSD = torch.cat([v_BGSD, v_BGSD], dim=1)
        # As wide as the values, for which torch has a fused kernel; the zeros add nothing to the logits.
        q_BHTD, k_BGSD = (pad(x, (0, self.head_dim)) for x in (q_BHTD, k_BGSD))
        first, second = sdpa(q_BHTD, k_BGSD, v_BGSD, mask, dropout_p, self.scaling).chunk(2, dim=1)
        plus, minus = (self.lambda_q.float() * self.lambda_k.float()).sum(-1).exp()
        return first - (plus - minus + self.lambda_init).to(first.dtype) * second

    @torch.no_grad()
    def init_norm(self) -> None:
        super().init_norm()
        initialization.normal_(self.lambda_q, std=0.1)
        initialization.normal_(self.lambda_k, std=0.1)


def sdpa(q_BHTD, k_BGSD, v_BGSD, mask, dropout_p: float, scale: float) -> torch.Tensor:
    """Causal softmax attention; `mask` from `causal_mask`."""
    return scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None and q_BHTD.shape[2] > 1,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1],
    )


# ---- model ----------------------------------------------------------------------------------------------------------
class MTADecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MTAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = (DiffAttention if config.attention == "diff" else MTAAttention)(config, layer_idx)


class MTAPreTrainedModel(PreTrainedModel):
    config_class = MTAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["MTADecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    # identity plus a small update vanishes in bfloat16, whose spacing near 1 is 2^-7
    _keep_in_fp32_modules_strict: ClassVar = ["kernels"]
    _can_record_outputs: ClassVar = {"hidden_states": MTADecoderLayer, "attentions": MTAAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal of standard deviation fan_in^-1/2, cut at 3 of them."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = module.weight.shape[1] ** -0.5
            initialization.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            if getattr(module, "bias", None) is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.ParameterDict):
            init_kernels(module, self.config.kq_init)
        elif isinstance(module, MTAAttention):
            module.init_norm()
        else:
            super()._init_weights(module)


class MTAModel(MTAPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: MTAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MTADecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MTACache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, MTACache):
            raise TypeError(f"past_key_values is a {type(past_key_values).__name__}; pass MTACache(config), or nothing")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is None and use_cache and not self.training:
            past_key_values = MTACache(self.config)
        n_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        B, T, _ = inputs_embeds.shape

        if segment_ids is None:
            segment_ids = self._new_segments(B, T, attention_mask, position_ids, past_key_values)
        if past_key_values is not None:
            segment_ids = past_key_values.extend_segments(segment_ids)
        if position_ids is None:
            position_ids = torch.arange(n_past, n_past + T, device=inputs_embeds.device)[None]
        mask = None
        if any(layer.self_attn.uses_sdpa for layer in self.layers):
            mask = causal_mask(segment_ids, T, n_past + T, inputs_embeds.device)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                segment_ids_BS=segment_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    @staticmethod
    def _new_segments(B: int, T: int, attention_mask, position_ids, cache: MTACache | None) -> torch.Tensor | None:
        """The document of each new position, (B, T), padding -1; None: one document a row and no padding so far.

        With an attention mask (B, S), ones continue the row's last document and zeros are padding. Without one, a
        position id that doesn't follow its predecessor's begins a document, as in transformers' padding-free
        collators.
        """
        past_BP = cache.segment_ids_BS if cache is not None else None
        last_B1 = 0 if past_BP is None else past_BP.amax(dim=1, keepdim=True).clamp(min=0)
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(f"attention_mask has {attention_mask.ndim} axes: only (batch, positions) is supported")
            real_BT = attention_mask[:, -T:].bool()
            if past_BP is None and real_BT.all():
                return None
            return torch.where(real_BT, last_B1, -1)
        if position_ids is not None:
            starts_BT = torch.zeros_like(position_ids, dtype=torch.bool)
            starts_BT[:, 1:] = position_ids.diff(dim=1) != 1
            if cache is not None and cache.get_seq_length() > 0:
                starts_BT[:, 0] = position_ids[:, 0] == 0
            if past_BP is None and not starts_BT.any():
                return None
            return (last_B1 + starts_BT.cumsum(dim=1)).expand(B, T)
        return None if past_BP is None else last_B1.expand(B, T)


class MTAForCausalLM(MTAPreTrainedModel, GenerationMixin):
    """Language model over `MTAModel`; forward, loss, generate and checkpoints as in `LlamaForCausalLM`.

    `forward` also takes `segment_ids` (B, T): which document each (new) position belongs to, negative for padding;
    without it, attention_mask and position_ids say so.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MTAConfig):
        super().__init__(config)
        self.model = MTAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MTACache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: only MTACache is supported"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MTACache(self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    @classmethod
    def from_llama(cls, source: PreTrainedModel | str, head_norm: str = "none", **switches) -> "MTAForCausalLM":
        """Puts identity kernels into a trained model: the same function at first, to be trained further (Table 10).

        Args:
            source: a Llama (or an `MTAForCausalLM` with plain attention) or where `from_pretrained` finds one.
            head_norm: any norm but "none" changes the function; what the paper's retrofits use: NOT FOUND.
            switches: other `MTAConfig` fields, e.g. kq_layers. Kernels are per query head, also under GQA.
        """
        if not isinstance(source, PreTrainedModel):
            source = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        plain = source.config.model_type == "llama" or getattr(source.config, "attention", None) == "transformer"
        if not plain:
            kind = getattr(source.config, "attention", source.config.model_type)
            raise ValueError(f"from_llama needs a Llama or an MTAConfig with attention='transformer', not {kind!r}")
        fresh = {"attention": "mta", "kq_layers": None, "head_group_size": None, "eval_dropout": False}
        inherited = {k: v for k, v in source.config.to_dict().items() if k not in ("architectures", "model_type")}
        config = MTAConfig(**{**inherited, **fresh, "head_norm": head_norm, **switches})
        with initialization.no_init_weights():
            model = cls(config)
        weights = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        ours = ("norm_weight", "gate_weight", "gate_bias")
        added = {name for name in missing if ".kernels." in name or name.endswith(ours)}
        if unexpected or set(missing) - added:
            raise ValueError(f"not a Llama's weights: unexpected {unexpected}, missing {sorted(set(missing) - added)}")
        for layer in model.model.layers:
            layer.self_attn.init_norm()
            init_kernels(layer.self_attn.kernels, config.kq_init)
        for name in added:
            full = torch.promote_types(source.dtype, torch.float32) if "kernels" in name else source.dtype
            model.get_parameter(name).data = model.get_parameter(name).data.to(full)
        model.tie_weights()
        return model.to(source.device).train(source.training)


AutoConfig.register(MTAConfig.model_type, MTAConfig, exist_ok=True)
AutoModel.register(MTAConfig, MTAModel, exist_ok=True)
AutoModelForCausalLM.register(MTAConfig, MTAForCausalLM, exist_ok=True)
