"""What exists before the arms part, made once per seed: the starting policy and the classifier of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from papers.darling.classifier import (
    PairClassifier,
    agreement,
    best_threshold,
    held_out_scores,
    labelled_pairs,
    ngram_similarity,
    pairs_of,
    train_classifier,
)
from papers.darling.config import Config
from papers.darling.tasks import make_task
from shared.experiments import Run, UserError
from shared.training.starting_policy import measured, sft, starting_policy

ROLLOUTS = 8  # per prompt, for the classifier
POLICY = (
    "task",
    "rare",
    "layers",
    "width",
    "heads",
    "init_std",
    "n_traces",
    "sft_steps",
    "sft_batch_size",
    "sft_lr",
    "max_prompt_tokens",
    "max_new_tokens",
)
LEARNED = (
    "classifier_layers",
    "classifier_width",
    "classifier_steps",
    "classifier_lr",
    "classifier_groups",
    "classifier_init",
    "classifier_max_tokens",
    "label_noise",
)


@dataclass(frozen=True)
class Start:
    """Where the parts are, and what was measured when they were trained.

    policy, classifier, reward_model: directory or hub id; None for what the task does not have.
    measured: of those trained here.
    """

    policy: str
    classifier: str | None
    reward_model: str | None
    measured: dict[str, float]


def prepare(config: Config, run: Run) -> Start:
    """Trains what the config does not name, unless another run of the seed has already."""
    if not config.generated:
        return Start(config.model, config.classifier, config.reward_model, {})
    numbers: dict[str, float] = {}

    def part(name: str, build, fields: Sequence[str], **inputs) -> str:
        settings = {field: asdict(config)[field] for field in fields} | inputs
        # The key is relative to what the part was made from, not to where that is.
        settings = {key: Path(value).name if key == "policy" else value for key, value in settings.items()}

        def work(directory: Path) -> dict[str, float]:
            return build(directory, config=config, seed=run.seed, **inputs)

        directory = starting_policy(run, {"part": name, **settings}, work, seed=run.seed)
        numbers.update({f"{name}_{key}": value for key, value in measured(directory).items()})
        return str(directory)

    policy = config.model or part("policy", build_policy, POLICY)
    classifier = config.classifier or part("classifier", build_classifier, (*POLICY, *LEARNED), policy=policy)
    return Start(policy, classifier, None, numbers)


def build_policy(directory: Path, *, config: Config, seed: int) -> dict[str, float]:
    """A small Llama, fine-tuned on the world's traces."""
    from shared.models import llama_from_scratch, word_tokenizer

    task = make_task(config, seed)
    tokenizer = word_tokenizer(task.vocabulary)
    model = llama_from_scratch(
        tokenizer,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        positions=config.max_prompt_tokens + config.max_new_tokens,
        init_std=config.init_std,
        seed=seed,
    )
    loss = sft(
        model,
        tokenizer,
        task.traces(config.n_traces),
        directory=directory,
        steps=config.sft_steps,
        batch_size=config.sft_batch_size,
        lr=config.sft_lr,
        warmup_steps=config.sft_steps // 20,
        seed=seed,
    )
    rows = task.rows("dev")[:100]
    groups = rollouts(model, tokenizer, rows, config, seed)
    scores = [task.score(row, texts) for row, texts in zip(rows, groups, strict=True)]
    name = "correct" if task.verifiable else "coherent"
    competence = float(np.mean([value for found in scores for value in found[name]]))
    if config.sft_steps >= 100 and competence < 0.05:
        raise UserError(f"the starting policy's responses are {name} in {competence:.1%} only: raise sft_steps")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"loss": loss, name: competence}


def build_classifier(directory: Path, *, config: Config, seed: int, policy: str) -> dict[str, float]:
    """A small ModernBERT, trained on pairs of the starting policy's rollouts that the world's semantics label."""
    from shared.models import encoder_from_scratch
    from shared.training.runs import load_policy

    task = make_task(config, seed)
    model, tokenizer = load_policy(policy)
    rows, held_out_rows = prompts_of(task, config.classifier_groups)
    groups = rollouts(model, tokenizer, rows, config, seed)
    held_out = rollouts(model, tokenizer, held_out_rows, config, seed)
    pairs = labelled_pairs(groups, task.meaning, np.random.default_rng(seed), config.label_noise)

    classifier = encoder_from_scratch(
        tokenizer,
        layers=config.classifier_layers,
        width=config.classifier_width,
        heads=max(1, config.classifier_width // 24),
        positions=config.classifier_max_tokens,
        outputs=2,
        init_std=config.classifier_init,
        seed=seed,
    )
    options = {"max_tokens": config.classifier_max_tokens}
    untrained = held_out_scores(PairClassifier((classifier, tokenizer), **options), held_out, task.meaning)
    train_classifier(
        classifier,
        tokenizer,
        pairs,
        directory=directory / "trainer",
        options={
            "max_steps": config.classifier_steps,
            "per_device_train_batch_size": 64,
            "learning_rate": config.classifier_lr,
            "lr_scheduler_type": "cosine",
            "warmup_steps": config.classifier_steps // 12,
            "seed": seed,
        },
    )
    trained = held_out_scores(PairClassifier((classifier, tokenizer), **options), held_out, task.meaning)
    lexical = ngram_scores([(a, b) for a, b, _ in pairs], [same for *_, same in pairs], held_out, task.meaning)
    classifier.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    numbers = {"pairs": len(pairs), **trained}
    numbers |= {f"untrained_{key}": value for key, value in untrained.items()}
    return numbers | {f"ngram_{key}": value for key, value in lexical.items()}


def ngram_scores(pairs, labels, groups, meaning) -> dict[str, float]:
    """The same scores of a threshold on 4-gram similarity, chosen on the classifier's training pairs."""
    threshold = best_threshold(ngram_similarity(pairs), np.array(labels, dtype=bool))
    held_out = [pair for texts in groups for pair in pairs_of(texts)]
    truth_P = np.array([meaning(a) == meaning(b) for a, b in held_out])
    return agreement(ngram_similarity(held_out) > threshold, truth_P)


def prompts_of(task, groups: int) -> tuple[list[dict], list[dict]]:
    """As many training prompts, over and over where there are too few, and others to test on: a fifth of the world's,
    an eighth of `groups` at most."""
    rows = task.rows("train")
    held_out = min(len(rows) // 5, max(1, groups // 8))
    return list(islice(cycle(rows[held_out:]), groups)), rows[:held_out]


def rollouts(model, tokenizer, rows: Sequence[dict], config: Config, seed: int) -> list[list[str]]:
    """Eight samples at temperature 1 for each row."""
    from shared.generation import SamplingParams, load_sampler

    params = SamplingParams(max_new_tokens=config.max_new_tokens, seed=seed)
    sampler = load_sampler("transformers", model, tokenizer=tokenizer, batch_size=config.eval_batch_size)
    completions = sampler.sample([row["prompt"] for row in rows], n=ROLLOUTS, params=params)
    return [[completion.text for completion in found] for found in completions]
