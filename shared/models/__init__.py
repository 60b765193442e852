"""Small models from scratch, for the generated worlds of scale `tiny`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shared.experiments.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, ModernBertForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words between white space; decoding joins them with single spaces.

    It adds no token by itself, so the tokens of prompt and completion are those of their concatenation. Words that it
    does not know become <unk>. Padding goes to the left, where generation wants it.

    Args:
        words: the vocabulary; repetitions count once, the order does not matter.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ordinary = sorted(set(words) - set(SPECIAL_TOKENS))
    if bad := [word for word in ordinary if not word or word.split() != [word]]:
        raise UserError(f"a word must not be empty or hold white space: {bad[0]!r}")
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *ordinary))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def llama_from_scratch(
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int,
    width: int,
    heads: int,
    positions: int,
    mlp_width: int | None = None,
    init_std: float = 0.02,
    seed: int | None = None,
) -> LlamaForCausalLM:
    """A Llama with random weights in float32 for the tokenizer's vocabulary; embeddings tied to the output layer.

    Args:
        positions: longest sequence, prompt and completion together.
        mlp_width: default: 8/3 of the width, rounded up to a multiple of 4 (SwiGLU at the cost of a 4x MLP).
        init_std: standard deviation of embeddings and matrices. Llama's 0.02 suits a width of thousands; with a width
            below 100, 0.4 / sqrt(width) learns tables by heart much faster.
        seed: of the weights; None draws from torch's global generator.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp_width or -(-8 * width // 3 // 4) * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        initializer_range=init_std,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return _seeded(LlamaForCausalLM, config, seed)


def encoder_from_scratch(
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int,
    width: int,
    heads: int,
    positions: int,
    outputs: int,
    mlp_width: int | None = None,
    init_std: float = 0.1,
    seed: int | None = None,
) -> ModernBertForSequenceClassification:
    """A ModernBERT with random weights in float32 that classifies texts by the mean of its last states.

    Args:
        positions: longest text.
        outputs: classes; 1 for a reward model.
        mlp_width: default: twice the width.
        init_std: of the weights (cut at three of them); the default of the class, 0.02, is for far larger models.
        seed: of the weights; None draws from torch's global generator.
    """
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp_width or 2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_labels=outputs,
        initializer_range=init_std,
        classifier_pooling="mean",
        global_attn_every_n_layers=1,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    return _seeded(ModernBertForSequenceClassification, config, seed)


def _seeded(model_class, config, seed: int | None):
    import torch

    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return model_class(config)
