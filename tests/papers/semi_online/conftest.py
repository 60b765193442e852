"""A world of a few thousand parameters, its policy and its reward model made once."""

import dataclasses
import json

import pytest

from papers.semi_online.config import Config, Generated, Recipe
from shared.experiments.run import Run

SMALL = Generated(
    n_ops=[2, 2], modulus=5, layers=1, width=16, heads=2, mlp_width=32, sft_steps=150, sft_batch_size=24, sft_lr=1e-2,
    reward_pairs=64, reward_steps=4, gated=False,
)  # fmt: skip


def small_config(**options) -> Config:
    """Six steps of four prompts; `options` are Config's, those of all recipes under `recipe`."""
    recipe = {"steps": 6, "prompts": 4, "n_train": 20, "max_new_tokens": 6, "lr": 1e-3, **options.pop("recipe", {})}
    defaults = {
        "generated": SMALL,
        "num_generations": 6,
        "save_every": 2,
        "n_dev": 6,
        "n_test": 6,
        "test_samples": 2,
        **{phase: Recipe(**recipe) for phase in ("math", "chat", "both")},
    }
    return Config(**{**defaults, **options})


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """runs/semi_online/tiny; starting policies are shared by all tests."""
    return tmp_path_factory.mktemp("runs") / "semi_online" / "tiny"


@pytest.fixture
def make_run(home, request):
    def make(arm: str = "arm", seed: int = 0, stage: str = "train") -> Run:
        arm = f"{request.node.name.partition('[')[0]}-{arm}"
        run = Run(home / arm / str(seed), "semi_online", "tiny", arm, seed, stage, "key")
        run.dir.mkdir(parents=True, exist_ok=True)
        run.begin()
        return run

    return make


@pytest.fixture
def make_trainer(make_run):
    """(trainer, tokenizer) of an arm of the small world."""

    def make(config: Config, phase: str = "math", run: Run | None = None, **options):
        from papers.semi_online.train import make_trainer
        from papers.semi_online.worlds import Rewards, starting_points, train_rows

        config = dataclasses.replace(config, **options)
        run = run or make_run()
        policy, reward_model = starting_points(config, run)
        rows = train_rows(config, phase, run.seed)
        return make_trainer(config, phase, run, policy, Rewards(config, reward_model), rows)

    return make


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, str]:
    """Rows with the columns of the hub's datasets."""
    directory = tmp_path_factory.mktemp("prompts")
    problem = {"problem": "Find $1 + {i}$.", "solution": "It is $\\boxed{{{i}}}$.", "source": "cn_k12"}
    written = {
        "numinamath": [{k: v.format(i=i) for k, v in problem.items()} for i in range(60)],
        "math500": [
            {"problem": f"What is {i}?", "answer": "1", "unique_id": f"test/{i}", "subject": "Algebra", "level": 1}
            for i in range(3)
        ],
        "amc23": [{"question": f"Is it {i}?", "answer": float(i)} for i in range(2)],
        "wildchat": [
            {
                "conversation_hash": f"hash{i}",
                "conversation": [{"role": "user", "content": f"Tell me {i} jokes", "language": "English"}],
            }
            for i in range(40)
        ],
        "alpacaeval": [{"instruction": f"Name {i} cities", "dataset": "helpful_base"} for i in range(3)],
    }
    for name, rows in written.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(directory / f"{name}.jsonl") for name in written}
