"""Tiny checkpoints in the formats of the paper's models, and the smallest generated worlds."""

import json

import pytest

from papers.divpo.config import Config
from shared.experiments.paper import load_paper
from shared.experiments.run import Run, resolve_config

PERSONAS = (
    '{"first_name": "Ada", "city": "Oslo", "occupation": "baker"}',
    '{"city": "Rome", "first_name": "Bo", "occupation": "clerk"}',
    "I do not know.",
)
KEYWORDS = ("a dog b c d", "the girl tell me joke", "write one")
ANSWERS = ("Tell me a joke.", "One dog.", "I do not know.")

SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "n_values": 4,
    "n_topics": 3,
    "n_words": 6,
    "n_styles": 4,
    "sft_steps": 150,
    "sft_batch_size": 32,
    "sft_examples": 500,
    "sft_lr": 1e-2,
    "least_competence": 0.1,
    "steps": 3,
    "prompts_per_step": 4,
    "num_generations": 6,
    "n_samples": 40,
    "unique_first": 2,
    "test_prompts": 3,
    "samples_per_prompt": 4,
    "generation_batch_size": 64,
}


@pytest.fixture
def make_run(tmp_path):
    def make(stage="train", arm="arm", seed=0, scale="tiny", name="runs") -> Run:
        run = Run(tmp_path / name / arm / str(seed), "divpo", scale, arm, seed, stage, "key")
        run.dir.mkdir(parents=True, exist_ok=True)
        run.begin()
        return run

    return make


@pytest.fixture
def small():
    def make(**values) -> Config:
        return Config(**{**SMALL, **values})

    return make


def at_scale(scale: str, arm: str, **values) -> Config:
    """The scale's config of an arm with some values replaced."""
    overrides = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    return resolve_config(load_paper("divpo"), Config, scale, arm, overrides)


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory):
    """By task, a chat model in the format of Llama 3.1 whose answers are good, bad and different."""
    from tests.tiny_chat import chat_checkpoint

    replies = {"persona": PERSONAS, "keywords": KEYWORDS, "instruct": ANSWERS}
    return {
        task: chat_checkpoint(tmp_path_factory.mktemp(task), "llama", answers, seed=i)
        for i, (task, answers) in enumerate(replies.items())
    }


@pytest.fixture(scope="session")
def armo_checkpoint(tmp_path_factory):
    """A random ArmoRM of two layers with the parameters and names of the original."""
    import torch
    from transformers import LlamaConfig

    from papers.divpo.armo import LlamaForGatedReward
    from tests.tiny_chat import SIZES, chat_tokenizer

    directory = tmp_path_factory.mktemp("armo")
    tokenizer = chat_tokenizer("llama")
    sizes = {"num_objectives": 5, "gating_hidden_dim": 12, "gating_n_hidden": 3, "gating_temperature": 10}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForGatedReward(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **sizes))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.3)
        model.gating.logit_scale.data.fill_(1.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def wildchat(tmp_path_factory):
    """Rows with WildChat's columns."""
    path = tmp_path_factory.mktemp("wildchat") / "rows.jsonl"
    rows = [
        {
            "conversation_hash": f"h{i}",
            "conversation": [
                {"role": "user", "content": f"Tell me joke number {i}.", "language": "English", "toxic": i == 3},
                {"role": "assistant", "content": "No.", "language": "English", "toxic": False},
            ],
            "language": "English",
        }
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
