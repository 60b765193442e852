"""A world of two-digit sums on a model of a few thousand parameters."""

import pytest

from shared.experiments.run import Run

DIGITS = "0123456789"


@pytest.fixture(scope="session")
def tokenizer():
    from shared.models import word_tokenizer

    return word_tokenizer([*DIGITS, "+", "="])


@pytest.fixture
def model(tokenizer):
    from shared.models import llama_from_scratch

    return llama_from_scratch(tokenizer, layers=1, width=16, heads=2, positions=16, seed=0)


@pytest.fixture
def rows():
    return [
        {"prompt": f"{a} + {b} =", "answer": str((a + b) % 10), "item": f"{a}{b}"} for a in range(3) for b in range(4)
    ]


@pytest.fixture
def make_run(tmp_path):
    def make(name="arm", seed=0):
        run = Run(tmp_path / "runs" / name / str(seed), "toy", "tiny", name, seed, "train", "key")
        run.dir.mkdir(parents=True, exist_ok=True)
        run.begin()
        return run

    return make


@pytest.fixture
def run(make_run):
    return make_run()
