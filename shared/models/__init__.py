"""Small language models from scratch, for the generated worlds of scale `tiny`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shared.experiments.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
    seed: int | None = None,
) -> LlamaForCausalLM:
    """A Llama with random weights in float32 for the tokenizer's vocabulary; embeddings tied to the output layer.

    Args:
        positions: longest sequence, prompt and completion together.
        mlp_width: default: 8/3 of the width, rounded up to a multiple of 4 (SwiGLU at the cost of a 4x MLP).
        seed: of the weights; None draws from torch's global generator.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp_width or -(-8 * width // 3 // 4) * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return LlamaForCausalLM(config)
