"""Evaluate one trained arm: on held-out prompts at every kept checkpoint, on test prompts at the best and the last one.

    python -m papers.semi_online.eval --scale tiny --arm s10 --seed 0

Scores per test item (predictions.jsonl) and means (eval.json); means over an item's samples, temperature .6, top-p .9:
    accuracy, accuracy_last     right answers of the checkpoint with the best development accuracy, and of the last one
    reward, reward_last         chat: the reward model's score
    win_rate, win_rate_last     chat: wins against the starting policy's responses to the same prompts, by the gold
                                score in the generated world, by the reward model on the hub
    judge_win_rate, _last       chat on the hub with a judge_model: its verdict on the first responses
    gold, gold_last             chat, generated world: the hidden reader's score
    length, length_last         tokens (of chat: chat_length, chat_length_last)
An arm that trained on several kinds of prompts, and the other task of an arm that trained on one, have `_last` only.
Numbers of the whole run (eval.json):
    best_step                   the checkpoint that was chosen
    rollout_entropy_start, _end, _ratio; rollout_length_start, _end, _ratio
                                of the samples in training, in nats per token and in tokens: first 5 steps, last tenth,
                                their ratio
    policy_entropy, policy_entropy_ratio
                                of the last checkpoint's own samples on held-out prompts; against the starting policy's
    judge_unparsable, judge_truncated, judge_failed
                                questions, of judge_rows, to which the judge gave no verdict, and why
    generator_calls, sampled_tokens, generated_tokens_per_second
                                of training (DPO)
log.jsonl gets a row for each checkpoint: policy_step, dev_accuracy, dev_reward, dev_gold, dev_length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from papers.semi_online.config import Config
from papers.semi_online.train import snapshot
from papers.semi_online.worlds import Rewards, gold_scores, starting_points, task_rows
from shared.experiments import Run, UserError, files, stage_main

if TYPE_CHECKING:
    from shared.rewards.judge import Judge

DEV_SEED, TEST_SEED, ENTROPY_SEED = 1, 2, 3
FIRST_STEPS = 5


def evaluate(config: Config, run: Run) -> dict[str, float]:
    if not run.checkpoint.is_dir():
        raise UserError(f"{run.checkpoint}: no checkpoint; run papers.semi_online.train with the same arguments")
    policy, reward_model = starting_points(config, run)
    asker = Asker(config, Rewards(config, reward_model))
    tasks = ["math", "chat"] if config.all_tasks else config.trained_tasks
    metrics = training_log(run)
    judge = load_judge(config) if config.judge_model and "chat" in tasks else None

    checkpoints = kept_checkpoints(config, run, policy)
    chosen = choose(config, run, asker, checkpoints, metrics)
    rows: dict[str, dict] = {}
    for task in tasks:
        test = task_rows(config, task, "test", config.n_test)
        baseline = asker.ask(policy, task, test, config.test_samples, TEST_SEED) if task == "chat" else None
        wanted = {"_last": run.checkpoint}
        if chosen is not None and task in config.trained_tasks:
            wanted[""] = chosen
        elif config.method == "none":
            wanted[""] = run.checkpoint
        asked = {
            path: asker.ask(path, task, test, config.test_samples, TEST_SEED) for path in dict.fromkeys(wanted.values())
        }
        verdicts = {
            path: judged(judge, test, found, baseline) for path, found in asked.items() if judge and task == "chat"
        }
        for suffix, path in wanted.items():
            found = asked[path]
            for i, row in enumerate(test):
                record = rows.setdefault(f"{task}/{row['item']}", new_record(row))
                record[f"outputs{suffix}"] = found["texts"][i]
                record["scores"] |= {k + suffix: v for k, v in scores(row, found, baseline, i, asker.by_gold).items()}
                if path in verdicts and verdicts[path][i] is not None:
                    record["scores"][f"judge_win_rate{suffix}"] = verdicts[path][i]
    if judge:
        metrics |= {f"judge_{name}": count for name, count in {"rows": 0, **judge.counts}.items()}
    metrics |= policy_entropies(config, asker, policy, run.checkpoint)
    predictions = list(rows.values())
    run.write_predictions(predictions)
    for name in dict.fromkeys(name for record in predictions for name in record["scores"]):
        metrics[name] = float(np.mean([r["scores"][name] for r in predictions if name in r["scores"]]))
    return metrics


def load_judge(config: Config) -> Judge[float]:
    from papers.semi_online.judge import read_choice
    from shared.generation import load_sampler
    from shared.rewards.judge import Judge

    options = {"base_url": config.judge_url} if config.judge_backend == "openai" else {}
    return Judge(load_sampler(config.judge_backend, config.judge_model, **options), read_choice)


def judged(judge: Judge[float], rows: Sequence[dict], found: dict, baseline: dict) -> list[float | None]:
    """The judge's verdicts on the first response to each prompt."""
    from papers.semi_online.judge import judged_wins

    first, other = ([texts[0] for texts in side["texts"]] for side in (found, baseline))
    return judged_wins(judge, [row["prompt"] for row in rows], first, other)


def kept_checkpoints(config: Config, run: Run, policy: Path | str) -> dict[int, Path | str]:
    """step -> checkpoint: the starting policy, those kept in training, the last one."""
    if config.method == "none":
        return {0: run.checkpoint}
    steps = getattr(config, config.phases[-1]).steps
    kept = {step: snapshot(run, step) for step in range(config.save_every, steps, config.save_every)}
    if gone := [str(path) for path in kept.values() if not path.is_dir()]:
        raise UserError(f"{', '.join(gone)}: no such checkpoint; FORCE=1 trains again")
    return {0: policy, **kept, steps: run.checkpoint}


def choose(
    config: Config, run: Run, asker: Asker, checkpoints: dict[int, Path | str], metrics: dict[str, float]
) -> Path | str | None:
    """Logs how every checkpoint does on held-out prompts. Returns the best trained one, if the arm has one task.

    Math: by accuracy. Chat: by the mean reward over the mean length, the paper's criterion; in the generated world by
    the mean reward, because the score of a model learned from comparisons has no zero, and a quotient needs one.
    """
    best: tuple[float, int] | None = None
    for number, (step, path) in enumerate(checkpoints.items(), start=1):
        logged: dict[str, float] = {"policy_step": step}
        for task in config.trained_tasks:
            dev = task_rows(config, task, "dev", config.n_dev)
            found = asker.ask(path, task, dev, config.dev_samples, DEV_SEED)
            if task == "math":
                logged |= {"dev_accuracy": mean(found["rewards"]), "dev_length": mean(found["lengths"])}
                value = logged["dev_accuracy"]
            else:
                logged |= {"dev_reward": mean(found["rewards"]), "dev_chat_length": mean(found["lengths"])}
                value = logged["dev_reward"] / (logged["dev_chat_length"] if config.world == "hub" else 1)
                if asker.by_gold:
                    logged["dev_gold"] = mean(found["gold"])
        run.log(number, len(checkpoints) + 1, **{name: round(value, 5) for name, value in logged.items()})
        if config.selects and step and (best is None or value > best[0]):
            best = value, step
    if best is None:
        return None
    metrics["best_step"] = best[1]
    return checkpoints[best[1]]


class Asker:
    """Samples of checkpoints, with their rewards."""

    def __init__(self, config: Config, rewards: Rewards):
        self.config, self.rewards = config, rewards
        self.by_gold = config.world == "generated"
        self._loaded: tuple[str, object] = ("", None)

    def sample(self, path: Path | str, task: str, rows: Sequence[dict], n: int, seed: int, **options):
        from shared.generation import SamplingParams

        longest = getattr(self.config, task).max_new_tokens
        params = SamplingParams(**{"max_new_tokens": longest, "seed": seed, **options})
        return self._sampler(path).sample([row["prompt"] for row in rows], n=n, params=params)

    def ask(self, path: Path | str, task: str, rows: Sequence[dict], n: int, seed: int) -> dict[str, list]:
        """For each row n texts, their rewards, their lengths in tokens, and (generated chat) their gold scores."""
        found = self.sample(
            path, task, rows, n, seed, temperature=self.config.eval_temperature, top_p=self.config.eval_top_p
        )
        texts = [[c.text for c in completions] for completions in found]
        many = [row for row in rows for _ in range(n)]
        columns = {name: [row.get(name) for row in many] for name in {key for row in rows for key in row} - {"prompt"}}
        chat = not isinstance(rows[0]["prompt"], str)
        flat = [text for of_row in texts for text in of_row]
        completions = [[{"role": "assistant", "content": text}] if chat else text for text in flat]
        rewards = self.rewards([row["prompt"] for row in many], completions, **columns)
        # A problem whose gold answer cannot be parsed has no reward; it counts as wrong, in every arm.
        rewards = [0.0 if reward is None else reward for reward in rewards]
        result = {
            "texts": texts,
            "rewards": grouped(rewards, n),
            "lengths": [[len(c.token_ids) for c in completions] for completions in found],
        }
        if task == "chat" and self.by_gold:
            result["gold"] = grouped(gold_scores(many, flat), n)
        return result

    def _sampler(self, path: Path | str):
        from shared.generation import load_sampler

        if self._loaded[0] != str(path):
            if self._loaded[1] is not None:
                self._loaded[1].close()
            backend = "vllm" if self.config.use_vllm else "transformers"
            options = {} if self.config.use_vllm else {"batch_size": self.config.generation_batch_size}
            self._loaded = (str(path), load_sampler(backend, path, **options))
        return self._loaded[1]


def scores(row: dict, found: dict[str, list], baseline: dict[str, list] | None, i: int, by_gold: bool) -> dict:
    """The scores of one test item, without suffix."""
    from shared.evaluation.win_rate import wins

    if row["task"] == "math":
        # Of several test sets the first one, `metric`, is what claims are about.
        name = row.get("metric", "accuracy")
        return {name: float(np.mean(found["rewards"][i])), "length": float(np.mean(found["lengths"][i]))}
    judged = "gold" if by_gold else "rewards"
    values = {
        "reward": float(np.mean(found["rewards"][i])),
        "win_rate": float(np.mean(wins(found[judged][i], baseline[judged][i]))),
        "chat_length": float(np.mean(found["lengths"][i])),
    }
    return values | ({"gold": float(np.mean(found["gold"][i]))} if by_gold else {})


def policy_entropies(config: Config, asker: Asker, policy: Path | str, last: Path) -> dict[str, float]:
    """Mean entropy per token, in nats, of what the last checkpoint samples at temperature 1 for the (first) task that
    the arm was trained on."""
    found = {}
    task = config.trained_tasks[0]
    dev = task_rows(config, task, "dev", config.n_dev)
    for name, path in (("start", policy), ("end", last)):
        sampled = asker.sample(path, task, dev, 1, ENTROPY_SEED, logprobs=True)
        found[name] = -float(np.mean([x for (completion,) in sampled for x in completion.logprobs]))
    return {"policy_entropy": found["end"], "policy_entropy_ratio": found["end"] / found["start"]}


def training_log(run: Run) -> dict[str, float]:
    """What the log of training says about the rollouts; nothing for the arm that does not train."""
    rows = [row for row in files.read_jsonl(run.dir / "log.jsonl") if row["stage"] == "train"] if _logged(run) else []
    found: dict[str, float] = {}
    for name, series in rollout_series(rows).items():
        if series:
            start, end = np.mean(series[:FIRST_STEPS]), np.mean(series[-max(1, len(series) // 10) :])
            found |= {f"rollout_{name}_start": float(start), f"rollout_{name}_end": float(end)}
            found[f"rollout_{name}_ratio"] = float(end / start)
    if rows and "rollout/calls" in rows[-1]:
        calls, tokens, seconds = (
            increments([row[f"rollout/{name}"] for row in rows]) for name in ("calls", "tokens", "seconds")
        )
        found |= {
            "generator_calls": calls,
            "sampled_tokens": tokens,
            "generated_tokens_per_second": tokens / seconds,
        }
    return found


def increments(values: Sequence[float]) -> float:
    """The sum of a counter's increments; it begins again at 0 in a process that resumes."""
    return float(sum(b - a if b >= a else b for a, b in zip([0.0, *values], values, strict=False)))


def rollout_series(rows: Sequence[dict]) -> dict[str, list[float]]:
    """entropy and length of the rollouts by step, whichever trainer logged them."""
    keys = {"entropy": ("rollout/entropy", "entropy"), "length": ("rollout/length", "completions/mean_length")}
    return {
        name: [next(row[key] for key in either if key in row) for row in rows if set(either) & set(row)]
        for name, either in keys.items()
    }


def _logged(run: Run) -> bool:
    return (run.dir / "log.jsonl").exists()


def new_record(row: dict) -> dict:
    """What predictions.jsonl says about a test item, apart from outputs and scores."""
    shown = {name: row[name] for name in ("prompt", "answer", "keywords") if name in row}
    return {"item": f"{row['task']}/{row['item']}", **shown, "scores": {}}


def grouped(values: Sequence[float], n: int) -> list[list[float]]:
    return [list(values[i : i + n]) for i in range(0, len(values), n)]


def mean(values: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(of_row) for of_row in values]))


if __name__ == "__main__":
    stage_main("eval", Config, evaluate)
