"""Reward models learned from comparisons (Bradley-Terry), through TRL's RewardTrainer.

    model = encoder_from_scratch(tokenizer, layers=1, width=64, heads=4, positions=64, outputs=1, seed=0)
    train_reward_model(model, tokenizer, comparisons, directory=directory, steps=500, lr=3e-3, seed=0)
    accuracy = pair_accuracy(RewardModel(directory), held_out)

What `directory` holds then is an ordinary checkpoint, which `shared.rewards.reward_model.RewardModel` scores with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared.experiments.errors import UserError
from shared.rewards.reward_model import token_ids

Comparison = tuple[str | Sequence[Mapping], str, str]
"""(prompt, chosen completion, rejected completion); the prompt is text, or chat messages."""


def train_reward_model(
    model,
    tokenizer,
    comparisons: Sequence[Comparison],
    *,
    directory: Path,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    warmup_steps: int = 0,
) -> float:
    """Trains `model` in place on the mean over pairs of -log sigmoid(r(chosen) - r(rejected)), and saves it with its
    tokenizer in `directory`. AdamW, cosine schedule, float32; the seed decides order and dropout.

    Prompt and completion become the tokens that `RewardModel` will score: text is joined as it is, a conversation
    rendered with the chat template.

    Args:
        model: a sequence classifier with one output (`AutoModelForSequenceClassification`, `encoder_from_scratch`).
        batch_size: pairs per optimizer step.

    Returns: the mean loss over the last tenth of the steps, in nats per pair.

    Raises UserError naming the comparison for one that has twice the same completion (nothing can be learned from it;
    leave those out), does not fit into the model's context, or ends with the padding token; and if there is none.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from shared.training.runs import cosine_options, train_whole

    schedule = {"steps": steps, "batch_size": batch_size, "lr": lr, "warmup_steps": warmup_steps, "seed": seed}
    options = RewardConfig(**cosine_options(directory / "trainer", **schedule, max_length=None))
    table = Dataset.from_dict(encode(comparisons, tokenizer, model.config))
    losses = train_whole(RewardTrainer(model, options, train_dataset=table, processing_class=tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return losses[-1]


def encode(comparisons: Sequence[Comparison], tokenizer, config) -> dict[str, list[list[int]]]:
    """The columns of TRL's RewardTrainer, `chosen_ids` and `rejected_ids`, for the model of this config."""
    if not comparisons:
        raise UserError("there are no comparisons to learn a reward model from")
    for i, (_, chosen, rejected) in enumerate(comparisons):
        if chosen == rejected:
            raise UserError(f"comparison {i}: chosen and rejected are the same: {chosen!r}; leave such pairs out")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    columns = {}
    for k, name in ((1, "chosen_ids"), (2, "rejected_ids")):
        columns[name] = token_ids(tokenizer, [pair[0] for pair in comparisons], [pair[k] for pair in comparisons])
        for i, ids in enumerate(columns[name]):
            if not ids:
                raise UserError(f"comparison {i}: prompt and completion are empty")
            if context is not None and len(ids) > context:
                raise UserError(f"comparison {i}: {len(ids)} tokens do not fit into the model's context of {context}")
            if ids[-1] == tokenizer.pad_token_id:  # decoders read their score at the last other token
                raise UserError(f"comparison {i} ends with the padding token; give the tokenizer another pad_token")
    return columns


def pair_accuracy(
    reward: Callable[..., Sequence[float | None]], comparisons: Sequence[Comparison], **columns: Sequence
) -> float:
    """The share of comparisons whose chosen completion `reward` scores higher; equal scores count one half, so that a
    reward that says nothing gets .5.

    Args:
        columns: what the reward needs beside prompts and completions, one entry for each comparison.
    """
    from shared.evaluation.win_rate import wins

    if not comparisons:
        raise UserError("there are no comparisons to judge a reward model by")
    prompts = [pair[0] for pair in comparisons]
    chosen, rejected = (reward(prompts, [pair[k] for pair in comparisons], **columns) for k in (1, 2))
    return float(wins(chosen, rejected).mean())
