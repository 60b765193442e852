"""A tiny Llama checkpoint with a byte-level tokenizer, random but far from uniform."""

import pytest
import torch

LETTERS = "abcdefgh ."
SPECIAL = ["<pad>", "<bos>", "<eos>"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}. {% endfor %}{% if add_generation_prompt %}h{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE: 3 special tokens, 10 characters, the two bytes of "é", and 3 merges ("ab", "cd", "abcd")."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [split.pre_tokenize_str(c)[0][0] for c in LETTERS] + list(split.pre_tokenize_str("é")[0][0])
    vocab = SPECIAL + characters + [a + b for a, b in MERGES]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=MERGES))
    bpe.pre_tokenizer = split
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def build_model(tokenizer):
    """build_model(family="llama", **config): a seeded random causal LM over `tokenizer`."""

    def build(family: str = "llama", **config):
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        common = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        torch.manual_seed(0)
        if family == "gpt2":
            sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
            model = GPT2LMHeadModel(GPT2Config(**common | sizes | config))
        else:
            sizes = {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128,
            }
            model = LlamaForCausalLM(LlamaConfig(**common | sizes | config))
        with torch.no_grad():
            # Larger weights than at initialisation: attention that matters, and logits with a spread of several nats.
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
            model.get_output_embeddings().weight.mul_(2)
            model.get_output_embeddings().weight[: len(SPECIAL)].mul_(0.3)  # so that texts do not end at once
        return model.eval()

    return build


@pytest.fixture(scope="session")
def model(build_model):
    return build_model()


@pytest.fixture(scope="session")
def checkpoint(model, tokenizer, tmp_path_factory):
    """Directory of `model` and `tokenizer`."""
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
