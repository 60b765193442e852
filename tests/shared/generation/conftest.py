"""A tiny Llama checkpoint with a byte-level tokenizer, random but far from uniform."""

import numpy as np
import pytest
import torch

LETTERS = "abcdefgh ."
SPECIAL = ["<pad>", "<bos>", "<eos>"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}. {% endfor %}{% if add_generation_prompt %}h{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Here and in the processes that tests start: models as small as these are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def prompts():
    """Texts of 1 to 16 tokens."""
    return ["a", "abcd ef", "gh. é", "bad cab", "feed", "hhh hh h", "c", "e.e.e.e.e.e.e.e."]


@pytest.fixture(scope="session")
def next_distribution():
    """next_distribution(model, ids, temperature=1.0, top_k=0, top_p=1.0): what to sample from after `ids`, by its
    definition, in float64; shape (vocab,)."""

    def distribution(model, ids, temperature=1.0, top_k=0, top_p=1.0):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        p = torch.softmax(logits / temperature, -1).numpy()
        order = np.argsort(-p)
        if top_k:
            p[order[top_k:]] = 0
            p /= p.sum()
        keep = 1 + int(np.sum(np.cumsum(p[order]) < top_p))
        p[order[keep:]] = 0
        return p / p.sum()

    return distribution


@pytest.fixture(scope="session")
def check_frequencies():
    """check_frequencies(tokens, p): tokens were drawn from p, by a chi-square test at 1e-3; none where p is 0."""
    from scipy.stats import chisquare

    def check(tokens, p):
        counts = np.bincount(tokens, minlength=len(p))
        assert counts[p == 0].sum() == 0
        expected = p * counts.sum()
        common = expected >= 5  # the others share one bin, as the chi-square test wants
        assert common.sum() > 1
        counts = np.append(counts[common], counts[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
        assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3

    return check
