"""Coconut: a causal language model that reasons in a continuous latent space (arXiv 2412.06769, Section 3).

In *latent mode* the input embedding at position t is not that of a token but ``h_{t-1}``, the last hidden state of
the position before it, taken after the model's final norm. :class:`CoconutForCausalLM` wraps an ordinary
decoder-only language model and runs this mode at every position whose id is ``latent_token_id``; all other positions
are ordinary tokens (*language mode*).

Axes: B rows, T positions of the call, P cached positions before it, D hidden size, V vocabulary, K thoughts of a row,
N supervised tokens.
"""

import copy
import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

IGNORE_INDEX = -100  # label of positions without loss, as everywhere in transformers


class CoconutConfig(PreTrainedConfig):
    """Configuration of :class:`CoconutForCausalLM`.

    Args:
        text_config: configuration of the wrapped language model (transformers' name for this sub-configuration).
        latent_token_id: the id that marks a position as latent. It is a row of the base model's vocabulary, but its
            embedding is never read and ``generate`` never emits it.
        bot_token_id, eot_token_id: ids of the markers around the latent span. Ordinary tokens for the model; recorded
            so that a checkpoint says how its prompts are built.
    """

    model_type = "coconut"
    sub_configs: ClassVar = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "thoughts"]

    text_config: dict | PreTrainedConfig | None = None
    latent_token_id: int | None = None
    bot_token_id: int | None = None
    eot_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read ``config.json``; raises ValueError if it belongs to another architecture."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a Coconut checkpoint: its config.json has architectures "
                f"{config_dict.get('architectures')} and model_type {config_dict.get('model_type')!r}, expected "
                "['CoconutForCausalLM'] and 'coconut'. To start from an ordinary language model use "
                "CoconutForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(...), latent_token_id=...)."
            )
        return config_dict, kwargs


@dataclass
class CoconutOutput(ModelOutput):
    """Output of :class:`CoconutForCausalLM`.

    Attributes:
        loss: scalar, mean cross-entropy over the supervised tokens; None without labels.
        logits: ``[B, T or logits_to_keep, V]``; None if labels were given and ``logits_to_keep`` was not.
        past_key_values: the cache; None unless asked for.
        thoughts: ``[B, K, D]``, the k-th continuous thought of each row in order of position, i.e. the hidden state
            that was its input embedding; rows with fewer than K thoughts end in zeros. None without latents.
            ``softmax(get_output_embeddings()(thoughts))`` reads a thought as a distribution over tokens.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: DynamicCache | None = None
    thoughts: torch.Tensor | None = None


class CoconutForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder-only language model with a latent mode. Make one from a language model with :meth:`from_base`.

    Latent positions may stand anywhere after the first token of a row, in different numbers and at different places
    in each row of a batch. One call costs one pass of the base model per column that holds a latent, plus one; hence
    it is cheapest if the rows are left-padded so that their first latents coincide: K thoughts then take K + 1 passes,
    all but the first and last over a single column. Keys and values of earlier columns are never recomputed, and
    gradients flow through them and through every thought.

    ``generate`` is that of transformers with everything it offers: its first pass over the prompt runs the latent
    mode, the following ones are ordinary cached decoding. Prompts are left-padded.
    """

    config_class = CoconutConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True  # for batches without latents, see forward
    accepts_loss_kwargs = False  # the loss is the mean over the micro-batch's tokens, Trainer must not rescale it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CoconutConfig, base: PreTrainedModel | None = None):
        if config.text_config is None or config.latent_token_id is None:
            raise ValueError(
                "CoconutConfig needs text_config (the base model's configuration) and latent_token_id; "
                "CoconutForCausalLM.from_base fills in both"
            )
        super().__init__(config)
        if base is None:
            self.base = AutoModelForCausalLM.from_config(config.text_config)
            self.post_init()
        else:
            self.base = base
            with no_init_weights():  # the base is as its owner made it
                self.post_init()
        # No sampling of latent positions: the language mode has no such token.
        self.generation_config.suppress_tokens = [config.latent_token_id]

    @classmethod
    def from_base(
        cls,
        base_model: PreTrainedModel,
        latent_token_id: int,
        bot_token_id: int | None = None,
        eot_token_id: int | None = None,
    ) -> "CoconutForCausalLM":
        """Wrap ``base_model`` (not copied: its parameters are the new model's).

        Raises:
            ValueError: ``base_model`` is not a decoder-only causal language model with a KV cache, or
                ``latent_token_id`` is not in its vocabulary.
        """
        _check_base(base_model, latent_token_id)
        config = CoconutConfig(
            text_config=base_model.config,
            latent_token_id=latent_token_id,
            bot_token_id=bot_token_id,
            eot_token_id=eot_token_id,
            attn_implementation=base_model.config._attn_implementation,  # else it would be reset in text_config, too
            dtype=base_model.dtype,
        )
        model = cls(config, base=base_model)
        suppress = model.generation_config.suppress_tokens + (base_model.generation_config.suppress_tokens or [])
        model.generation_config = copy.deepcopy(base_model.generation_config)
        model.generation_config.suppress_tokens = suppress
        model.training = base_model.training
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
    ) -> CoconutOutput:
        """Run both modes over ``input_ids``.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, P + T]``, 1 for tokens and latents, 0 for padding (left, right or both); default
                all ones.
            position_ids: ``[B, T]``; default: the number of unmasked positions before each one.
            labels: ``[B, T]`` as in transformers (shifted in here, -100 ignored). The output layer then runs on the N
                supervised tokens only.
            past_key_values: cache of the P positions before ``input_ids``, extended in place.
            use_cache: return the cache.
            logits_to_keep: return the logits of the last so many positions (0: all) or of the positions given.
                Default: all without labels, none with labels.

        Raises:
            ValueError: a latent without a position before it, more positions than the model has, no supervised token
                in ``labels``, shapes that do not fit, or gradient checkpointing together with latents or a cache
                (checkpointing would silently drop the cache and with it all that the thoughts attend to).
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        _check_shapes(input_ids, attention_mask, position_ids, labels, past)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1])
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        latent_BT = (input_ids == self.config.latent_token_id) & attention_mask[:, past:].bool()
        columns = latent_BT.any(0).nonzero().flatten().tolist()
        if columns:
            _check_latents_follow_a_token(latent_BT, attention_mask, past)
        self._check_positions(position_ids, latent_BT, past)

        if past_key_values is None and (columns or use_cache):
            past_key_values = DynamicCache(config=self.config.get_text_config())
        if past_key_values is not None and self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing does not work with latents or use_cache: it drops the KV cache that thoughts "
                "are made with. Call model.gradient_checkpointing_disable() or lower the batch size instead."
            )
        hidden_BTD = self._run_passes(input_ids, latent_BT, columns, attention_mask, position_ids, past_key_values)

        head = self.get_output_embeddings()
        loss = None if labels is None else _supervised_loss(hidden_BTD, labels, head)
        logits = None
        if labels is None or logits_to_keep is not None:
            keep = 0 if logits_to_keep is None else logits_to_keep
            logits = head(hidden_BTD[:, slice(-keep, None) if isinstance(keep, int) else keep])
        return CoconutOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            thoughts=_gather_thoughts(hidden_BTD, latent_BT) if columns else None,
        )

    def _run_passes(
        self,
        input_ids: torch.Tensor,
        latent_BT: torch.Tensor,
        columns: list[int],
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """Final hidden states ``[B, T, D]``: one pass from each column with latents up to the next such column.

        Within a pass only the first column can hold latents, and their input is known from the pass before. Pads and
        tokens of the other rows in that column keep their own embedding.
        """
        seq_len = input_ids.shape[1]
        past = attention_mask.shape[1] - seq_len
        spans = list(pairwise([0, *columns, seq_len]))
        embeds_BTD = self.get_input_embeddings()(input_ids)
        hidden: list[torch.Tensor] = []
        for (start, end), embeds in zip(spans, embeds_BTD.split([b - a for a, b in spans], dim=1), strict=True):
            if hidden:
                thought_B1D = hidden[-1][:, -1:].to(embeds.dtype)  # autocast may have changed it
                first_B1D = torch.where(latent_BT[:, start, None, None], thought_B1D, embeds[:, :1])
                embeds = torch.cat([first_B1D, embeds[:, 1:]], dim=1)
            output = self.base.base_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask[:, : past + end],
                position_ids=position_ids[:, start:end],
                past_key_values=cache,
                use_cache=cache is not None,
            )
            hidden.append(output.last_hidden_state)
        return torch.cat(hidden, dim=1)

    def _check_positions(self, position_ids: torch.Tensor, latent_BT: torch.Tensor, past: int) -> None:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is None or past + position_ids.shape[1] <= limit:
            return
        needed_B = position_ids.max(dim=1).values + 1
        row = int(needed_B.argmax())
        needed, latents = int(needed_B[row]), int(latent_BT[row].sum())
        if needed > limit:
            raise ValueError(
                f"row {row} of the batch needs {needed} positions ({needed - latents} tokens + {latents} latents), "
                f"but the model has {limit} (max_position_embeddings). Use fewer latents, a shorter prompt or fewer "
                "new tokens, or a base model with more positions."
            )


def _check_base(base: PreTrainedModel, latent_token_id: int) -> None:
    what = f"CoconutForCausalLM needs a decoder-only causal language model, got {type(base).__name__}"
    config = getattr(base, "config", None)
    is_causal_lm = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    is_causal_lm = is_causal_lm and isinstance(base, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if not is_causal_lm or base.get_output_embeddings() is None:
        raise ValueError(f"{what}: AutoModelForCausalLM does not make such a model (is it one without an LM head?)")
    if config.is_encoder_decoder:
        raise ValueError(f"{what}, an encoder-decoder model")
    needed = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
    if missing := needed - inspect.signature(base.forward).parameters.keys():
        raise ValueError(f"{what}, whose forward does not take {', '.join(sorted(missing))}")
    vocab_size = config.get_text_config().vocab_size
    if not 0 <= latent_token_id < vocab_size:
        raise ValueError(
            f"latent_token_id {latent_token_id} is not in the base model's vocabulary of {vocab_size}: add the token "
            "to the tokenizer and call base.resize_token_embeddings(len(tokenizer)) first"
        )
    _probe_base(base, what)


@torch.no_grad()
def _probe_base(base: PreTrainedModel, what: str) -> None:
    """Try what no attribute tells: hidden states ignore later tokens, and logits are head(hidden), nothing else."""
    head = base.get_output_embeddings()
    head_inputs = []

    def replace_logits(module, args, output):
        head_inputs.append(args[0])
        return torch.full_like(output, 100.0)  # large enough to show a soft cap

    in_training = [module for module in base.modules() if module.training]
    hook = head.register_forward_hook(replace_logits)
    base.eval()
    try:
        ids_BT, other_ids_BT = (torch.tensor([ids], device=base.device) for ids in ([0, 0], [0, 1]))
        hidden_BTD = base.base_model(input_ids=ids_BT).last_hidden_state
        other_hidden_BTD = base.base_model(input_ids=other_ids_BT).last_hidden_state
        logits_BTV = base(input_ids=ids_BT).logits
    finally:
        hook.remove()
        for module in in_training:
            module.training = True
    if not _equal_up_to_rounding(hidden_BTD[:, 0], other_hidden_BTD[:, 0]):
        raise ValueError(f"{what}, whose hidden states depend on later tokens (for a BERT-like model set is_decoder)")
    if not ((logits_BTV == 100).all() and _equal_up_to_rounding(head_inputs[0], hidden_BTD)):
        raise ValueError(f"{what}, whose logits are not its output layer of its last hidden state (soft cap, scaling)")


def _equal_up_to_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 16 * torch.finfo(b.dtype).eps * b.abs().max())


def _check_shapes(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    past: int,
) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [batch, length] with length >= 1, got shape {list(input_ids.shape)}")
    batch, seq_len = input_ids.shape
    if attention_mask is not None and attention_mask.shape != (batch, past + seq_len):
        raise ValueError(
            f"attention_mask must be [batch, cached + new positions] = {[batch, past + seq_len]}, "
            f"got {list(attention_mask.shape)}"
        )
    for name, tensor in (("position_ids", position_ids), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} must have input_ids' shape {[batch, seq_len]}, got {list(tensor.shape)}")


def _check_latents_follow_a_token(latent_BT: torch.Tensor, attention_mask: torch.Tensor, past: int) -> None:
    before_BT = F.pad(attention_mask[:, past:-1], (1, 0)).bool()  # is the position before this one in the call?
    orphans = (latent_BT & ~before_BT).nonzero()
    if len(orphans):
        row, column = orphans[0].tolist()
        where = "in the cache only as keys and values" if column == 0 and past else "padding or the start of the row"
        raise ValueError(
            f"row {row} of input_ids has a latent in column {column}, but what comes before it is {where}: a thought "
            "is the hidden state of the position before it. Start each row with at least one token, and pass a latent "
            "in the same call as the position before it."
        )


def _supervised_loss(hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Mean cross-entropy of the tokens with a label, each predicted from the position before it."""
    targets = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    index_N = (targets != IGNORE_INDEX).nonzero().flatten()
    if not len(index_N):
        raise ValueError(
            "labels hold no supervised token after the first position: all are -100, the loss is undefined"
        )
    logits_NV = head(hidden_BTD.flatten(0, 1).index_select(0, index_N))
    # float32 for half precision, but not for float64
    return F.cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets[index_N])


def _gather_thoughts(hidden_BTD: torch.Tensor, latent_BT: torch.Tensor) -> torch.Tensor:
    """``[B, K, D]``: the hidden states before the latent positions, in order."""
    rows, columns = latent_BT.nonzero(as_tuple=True)
    nth = latent_BT.cumsum(1)[rows, columns] - 1
    thoughts_BKD = hidden_BTD.new_zeros(hidden_BTD.shape[0], int(nth.max()) + 1, hidden_BTD.shape[2])
    return thoughts_BKD.index_put((rows, nth), hidden_BTD[rows, columns - 1])


AutoConfig.register("coconut", CoconutConfig)
AutoModelForCausalLM.register(CoconutConfig, CoconutForCausalLM)
