"""Evaluate one arm of DivPO: how good and how different are the policy's samples?

    python -m papers.divpo.eval --scale tiny --arm persona_divpo --seed 0

Everything is larger where there is more diversity, but for top_share. Names end in _t0.7 at temperature 0.7; without an
ending the temperature is 1.

persona, predictions per sample: valid. Numbers of the run:
    unique, unique_first_name ..     share of unique values among 100 valid samples; mean and each attribute
    top_share, name_entropy          share of the most frequent first name; entropy of 100 first names in nats
    entropy                          of a whole response, estimated from its log-probability
keywords and instruct, predictions per prompt: reward (mean over the samples), unique (words in all of them together),
compression (ratio of the joined samples), for keywords valid (share with exactly five words), and for arms that were
trained against a learned reward model learned_reward, what that says; reward is the truth. Numbers of the run:
    reward_model_accuracy            share of held-out pairs that the learned reward model orders right
    reward_at_unique                 interpolated along the arm's temperatures at `matched_unique` unique words
    story_reward, story_unique       of the stories that `model` writes from the keywords (per prompt)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from papers.divpo.config import Config
from shared.data import story
from shared.evaluation.diversity import compression_ratio, entropy, sampled_entropy, top_share, unique_words, words
from shared.experiments import Run, UserError, stage_main

if TYPE_CHECKING:
    from shared.generation import Completion, Sampler, SamplingParams
    from shared.training.preference import Reward

SEED = 1_000_000  # of the samples: none that training used
MOST_ROUNDS = 8  # of n_samples personas, to find enough valid ones
STORY_PROMPT = (
    'Write a story of one paragraph with the title "{title}". Use these keywords in it: {keywords}. '
    "Answer with the story and nothing else."
)


def evaluate(config: Config, run: Run) -> dict[str, float]:
    from shared.generation import load_sampler

    if not run.checkpoint.is_dir():
        raise UserError(f"{run.checkpoint}: no checkpoint; run papers.divpo.train with the same arguments")
    work = evaluate_persona if config.task == "persona" else evaluate_prompts
    options = {"batch_size": config.generation_batch_size} if config.sampler == "transformers" else {}
    with load_sampler(config.sampler, run.checkpoint, **options) as sampler:
        return work(config, run, sampler)


def sampling(config: Config, run: Run, temperature: float, round_: int = 0) -> SamplingParams:
    from shared.generation import SamplingParams

    seed = SEED + 1000 * run.seed + round_
    return SamplingParams(config.max_new_tokens, temperature, seed=seed, logprobs=True)


def suffix(temperature: float) -> str:
    return "" if temperature == 1 else f"_t{temperature:g}"


# ---- persona ----


def evaluate_persona(config: Config, run: Run, sampler: Sampler) -> dict[str, float]:
    from papers.divpo.tasks import load_reward, load_rows

    prompt, reward = load_rows(config, "test")[0]["prompt"], load_reward(config)
    metrics: dict[str, float] = {}
    for done, temperature in enumerate([1.0, *config.temperatures], start=1):
        completions: list[Completion] = []
        valid: list[float] = []
        while sum(valid) < config.unique_first and len(valid) < MOST_ROUNDS * config.n_samples:
            params = sampling(config, run, temperature, round_=len(valid))
            completions += sampler.sample([prompt], config.n_samples, params)[0]
            new = [c.text for c in completions[len(valid) :]]
            valid += reward([prompt] * len(new), new)
        if temperature == 1:
            run.write_predictions(
                {"item": f"sample-{i}", "output": c.text, "scores": {"valid": ok}}
                for i, (c, ok) in enumerate(zip(completions[: config.n_samples], valid, strict=False))
            )
            if sum(valid) < config.unique_first:
                raise UserError(
                    f"only {sum(valid):.0f} of {len(valid)} samples are valid, but unique values are counted among "
                    f"{config.unique_first}: the policy has lost the format (or lower unique_first, for every arm)"
                )
        numbers = persona_metrics(config, completions, valid)
        metrics |= {f"{name}{suffix(temperature)}": value for name, value in numbers.items()}
        run.log(done, 1 + len(config.temperatures))
    return metrics


def persona_metrics(config: Config, completions: Sequence[Completion], valid: Sequence[float]) -> dict[str, float]:
    """All that is defined: what is counted among `unique_first` valid samples needs so many."""
    from papers.divpo.tasks import attributes_of, unique_attributes

    found = attributes_of([c.text for c in completions])
    metrics = {"valid": float(np.mean(valid)), "entropy": sampled_entropy([c.logprobs for c in completions])}
    first = config.unique_first
    if len(found) >= first:
        names = [values["first_name"] for values in found]
        lots = [names[start : start + first] for start in range(0, len(names) - first + 1, first)]
        metrics |= unique_attributes(found, first)
        metrics |= {"top_share": top_share(names), "name_entropy": float(np.mean([entropy(lot) for lot in lots]))}
    return metrics


# ---- keywords, instruct ----


def evaluate_prompts(config: Config, run: Run, sampler: Sampler) -> dict[str, float]:
    from papers.divpo.tasks import load_reward, load_rows, load_trained_reward

    rows = load_rows(config, "test")
    temperatures = [1.0, *config.temperatures]
    total = len(temperatures) + 1 + config.stories
    groups = {}
    for done, temperature in enumerate(temperatures, start=1):
        params = sampling(config, run, temperature)
        groups[temperature] = sampler.sample([row["prompt"] for row in rows], config.samples_per_prompt, params)
        run.log(done, total)
    sampler.close()  # before the reward model needs the memory

    reward = load_reward(config)
    records = [{"item": row["item"], "prompt": row["prompt"], "scores": {}} for row in rows]
    metrics: dict[str, float] = {}
    for temperature, found in groups.items():
        outputs = [[c.text for c in group] for group in found]
        for record, scores in zip(records, prompt_scores(config, rows, outputs, reward), strict=True):
            record["scores"] |= {f"{name}{suffix(temperature)}": value for name, value in scores.items()}
        every = [c.logprobs for group in found for c in group]
        metrics[f"entropy{suffix(temperature)}"] = sampled_entropy(every)
    outputs = [[c.text for c in group] for group in groups[1.0]]
    for record, texts in zip(records, outputs, strict=True):
        record["outputs"] = texts
    if config.reward_model_learned:
        learned, metrics["reward_model_accuracy"] = load_trained_reward(config, run)
        for record, values in zip(records, score(rows, outputs, learned), strict=True):
            record["scores"]["learned_reward"] = float(np.mean(values))
    run.log(len(temperatures) + 1, total)
    if config.stories:
        write_stories(config, run, rows, records, reward)
        run.log(total, total)
    run.write_predictions(records)
    for name in records[0]["scores"]:
        metrics[name] = float(np.mean([record["scores"][name] for record in records]))
    if config.matched_unique and config.temperatures:
        curve = [(metrics[f"unique{suffix(t)}"], metrics[f"reward{suffix(t)}"]) for t in temperatures]
        metrics["reward_at_unique"] = reward_at(curve, config.matched_unique)
    return metrics


def prompt_scores(
    config: Config, rows: Sequence[dict], outputs: Sequence[Sequence[str]], reward: Reward
) -> list[dict[str, float]]:
    """The scores of each prompt's samples."""
    rewards = score(rows, outputs, reward)
    found = []
    for row, texts, values in zip(rows, outputs, rewards, strict=True):
        if None in values:
            raise UserError(f"item {row['item']}: the reward gave no number for sample {values.index(None)}")
        scores = {"reward": float(np.mean(values)), "unique": float(unique_words(texts))}
        scores["compression"] = compression_ratio(texts) if any(texts) else 0.0
        if config.task == "keywords":
            scores["valid"] = float(np.mean([len(words(text)) == story.N_KEYWORDS for text in texts]))
        found.append(scores)
    return found


def score(rows: Sequence[dict], outputs: Sequence[Sequence[str]], reward: Reward) -> list[list[float | None]]:
    """The reward of each sample of each prompt, all in one call."""
    flat = [(row, text) for row, texts in zip(rows, outputs, strict=True) for text in texts]
    columns = {name: [row[name] for row, _ in flat] for name in rows[0] if name != "prompt"}
    chat = not isinstance(rows[0]["prompt"], str)
    completions = [[{"role": "assistant", "content": text}] if chat else text for _, text in flat]
    values = iter(reward([row["prompt"] for row, _ in flat], completions, **columns))
    return [[next(values) for _ in texts] for texts in outputs]


def reward_at(curve: Sequence[tuple[float, float]], unique: float) -> float:
    """The reward at `unique` words, by linear interpolation between the temperatures of a curve of (unique, reward)."""
    ordered = sorted(curve)
    if not ordered[0][0] <= unique <= ordered[-1][0]:
        raise UserError(
            f"the arm has between {ordered[0][0]:.1f} and {ordered[-1][0]:.1f} unique words at its temperatures: "
            f"matched_unique={unique:g} is outside; add temperatures"
        )
    return float(np.interp(unique, *zip(*ordered, strict=True)))


def write_stories(config: Config, run: Run, rows: Sequence[dict], records: list[dict], reward: Reward) -> None:
    """Full stories (Table 2): the starting model writes one for each set of keywords; adds to the records' scores."""
    from shared.generation import SamplingParams, load_sampler

    prompts = [
        [{"role": "user", "content": STORY_PROMPT.format(title=row["title"].title(), keywords=text)}]
        for row, record in zip(rows, records, strict=True)
        for text in record["outputs"]
    ]
    params = SamplingParams(config.story_tokens, seed=SEED + run.seed)
    options = {"gpu_memory_utilization": 0.6} if config.sampler == "vllm" else {}  # the reward model is there, too
    with load_sampler(config.sampler, config.model, **options) as sampler:
        written = [completions[0].text for completions in sampler.sample(prompts, params=params)]
    n = config.samples_per_prompt
    for k, (row, record) in enumerate(zip(rows, records, strict=True)):
        stories = written[k * n : (k + 1) * n]
        request = {"prompt": [{"role": "user", "content": f'Write a story with the title "{row["title"].title()}".'}]}
        values = score([request], [stories], getattr(reward, "reward", reward))[0]
        record["stories"] = stories
        record["scores"] |= {"story_reward": float(np.mean(values)), "story_unique": float(unique_words(stories))}


if __name__ == "__main__":
    stage_main("eval", Config, evaluate)
