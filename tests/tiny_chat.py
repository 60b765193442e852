"""Tiny checkpoints in the formats of those that the papers use at scale `paper`, for tests.

Tokenizers have the special tokens, chat templates and habits of the originals (Llama 3.1: a token at the beginning that
text gets and the template writes as well, three tokens that end, none for padding; Qwen 3: ChatML). Models have the
originals' architectures with two layers. Chat models are trained for a moment to answer any message with one of a few
replies, so that rewards vary and completions end.

The fixtures in `conftest.py` (`llama_chat`, `qwen_chat`, `reward_checkpoint`, `pair_checkpoint`) build them once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CORPUS = (
    "The answer is $\\boxed{1}$. Find the number of positive integers such that the sum of the digits is equal to. "
    'What is the value of x? Let f(x) = x^2 + 2x + 1. {"first_name": "Ada", "city": "Oslo", "occupation": "baker"} '
    "Write a short story about a dog and a girl. Name one city in Africa. Tell me a joke. Therefore, the final answer "
    "is: I hope it is correct. Please reason step by step, and put your final answer within the box. Cutting Knowledge "
    "Date: December 2023 Today Date: 26 Jul 2024 system user assistant"
)
REPLIES = ("The answer is $\\boxed{1}$.", "So $x = \\boxed{2}$.", "I do not know.")

LLAMA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content | trim, messages[1:] %}"
    "{%- else %}{% set system, rest = '', messages %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}"
    "{{- 'Today Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}"
    "{%- for message in rest %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM runs on a CPU
    "max_position_embeddings": 1024,
}
FAMILIES = ("llama", "qwen")


def chat_tokenizer(family: str):
    """Byte-level BPE of about 500 tokens, with the special tokens and the chat template of Llama 3.1 or Qwen 3."""
    if family == "llama":
        special = ["begin_of_text", "end_of_text", "reserved_special_token_1", "start_header_id", "end_header_id"]
        special = [f"<|{name}|>" for name in (*special, "eom_id", "eot_id")]
        roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        tokenizer = _bpe(special, ("<|begin_of_text|>", None), roles)
        tokenizer.chat_template = LLAMA_TEMPLATE
    else:
        roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer = _bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], (None, None), roles)
        tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def chat_checkpoint(directory: Path, family: str, replies: Sequence[str] = REPLIES, seed: int = 0) -> Path:
    """A chat model, "llama" or "qwen", that answers every message with one of `replies`, each about equally often."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = chat_tokenizer(family)
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"] if family == "llama" else ["<|im_end|>", "<|endoftext|>"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = _config(family, tokenizer, eos_token_id=tokenizer.convert_tokens_to_ids(ends))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _teach(model, tokenizer, replies, random.Random(seed))
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id, do_sample=True, temperature=0.6, top_p=0.9
    )
    return _save(directory, model, tokenizer)


def reward_checkpoint(directory: Path, seed: int = 0) -> Path:
    """A random reward model like Athene-RM-8B: a Llama with one output. Its score is read where the tokenizer's
    `cls_token` ends the row (`RewardModel(..., ending=tokenizer.cls_token)`)."""
    tokenizer = chat_tokenizer("llama")
    tokenizer.cls_token = "<|reserved_special_token_1|>"
    return _save(directory, _classifier("llama", tokenizer, 1, seed), tokenizer)


def pair_checkpoint(directory: Path, family: str = "modernbert", seed: int = 0) -> Path:
    """A random classifier with two outputs of whether two texts mean the same: "modernbert" or "qwen".

    modernbert joins two texts as [CLS] a [SEP] b [SEP]; qwen has neither token, as Qwen3-Embedding has not.
    """
    if family == "modernbert":
        special = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]
        roles = {f"{name.strip('[]').lower()}_token": name for name in special}
        tokenizer = _bpe(special, ("[CLS]", "[SEP]"), roles)
    else:
        tokenizer = chat_tokenizer("qwen")
    return _save(directory, _classifier(family, tokenizer, 2, seed), tokenizer)


def _bpe(special: list[str], ends: tuple[str | None, str | None], roles: dict[str, str]):
    """ends: tokens that text gets before and after it (the second also between two texts)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([CORPUS], trainer)
    bpe.add_special_tokens(special)  # after the others, as in the originals
    before, after = ([token] if token else [] for token in ends)
    if before or after:
        bpe.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, "$B", *after],
            special_tokens=[(token, bpe.token_to_id(token)) for token in (*before, *after)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        model_max_length=SIZES["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )


def _config(family: str, tokenizer, **options):
    from transformers import LlamaConfig, ModernBertConfig, Qwen3Config

    options = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **options,
    }
    if family == "llama":
        return LlamaConfig(**SIZES, **options)
    if family == "qwen":
        return Qwen3Config(**SIZES, **options, tie_word_embeddings=True)
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    tokens = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    return ModernBertConfig(**sizes, **options | tokens | {"bos_token_id": None, "eos_token_id": None})


def _classifier(family: str, tokenizer, outputs: int, seed: int):
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = _config(family, tokenizer, num_labels=outputs)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # scores that differ from text to text
            if parameter.ndim == 2:
                parameter.data.mul_(5)
    return model


def _teach(model, tokenizer, replies: Sequence[str], rng: random.Random, steps: int = 160, batch: int = 8) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    answers = [[*tokenizer(r, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for r in replies]
    for _ in range(steps):
        length = int(2 ** rng.uniform(0, 6))  # words of the message
        rows = []
        for _ in range(batch):
            words = rng.choices(CORPUS.split(), k=length)
            noise = ["".join(rng.choices(LETTERS, k=rng.randint(1, 6))) for _ in words]
            text = " ".join(rng.choice(pair) for pair in zip(words, noise, strict=True))
            message = [{"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            rows.append((prompt, rng.choice(answers)))
        T = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids_BT = torch.tensor([p + a + [0] * (T - len(p) - len(a)) for p, a in rows])
        labels_BT = torch.tensor([[-100] * len(p) + a + [-100] * (T - len(p) - len(a)) for p, a in rows])
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _save(directory: Path, model, tokenizer) -> Path:
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
