"""TRL's GRPO, with what several papers need and it lacks: log-probabilities for rewards, exact resuming between the
updates of one batch of rollouts, a stream of prompts that does not depend on where training resumed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer
from trl.trainer.utils import pad

from shared.generation.text import prompt_lengths


class GRPOTrainer(TRLTrainer):
    """TRL's `GRPOTrainer`; the losses are its own.

    - A reward function with an attribute `needs_logprobs` that is true gets the column `logprobs`: for each completion
      the list of its tokens' log-probabilities at the sampling temperature under the policy before the update.
    - A checkpoint between two updates on the same rollouts keeps these rollouts, so that a resumed training ends like
      an uninterrupted one. Give it the prompts of `prompt_stream`: TRL's own order starts over after resuming in a
      later epoch.
    """

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if any(getattr(function, "needs_logprobs", False) for function in self.reward_funcs):
            logprobs = self._completion_logprobs(prompts, completion_ids_list)
            inputs = [{**row, "logprobs": values} for row, values in zip(inputs, logprobs, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    @torch.no_grad()
    def _completion_logprobs(self, prompts, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        device, pad_id = self.accelerator.device, self._tokenizer.pad_token_id
        prompt_BP, prompt_mask_BP = _padded(prompt_ids, pad_id, "left")
        completion_BT, mask_BT = _padded(completion_ids, pad_id, "right")
        logprobs_BT, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([prompt_BP, completion_BT], 1).to(device),
            torch.cat([prompt_mask_BP, mask_BT], 1).to(device),
            completion_BT.shape[1],
            batch_size=self.args.per_device_train_batch_size,
        )
        rows = zip(logprobs_BT.float().tolist(), completion_ids, strict=True)
        return [row[: len(ids)] for row, ids in rows]

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.steps_per_generation * self.num_iterations > 1:
            directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save({"step": self._step, "rollouts": self._buffered_inputs}, directory / self._rollouts_file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / self._rollouts_file).exists():
            saved = torch.load(path, map_location=self.accelerator.device, weights_only=False)
            self._step, self._buffered_inputs = saved["step"], saved["rollouts"]

    @property
    def _rollouts_file(self) -> str:
        return f"rollouts-{self.accelerator.process_index}.pt"


def prompt_stream(rows: Sequence[Mapping[str, Any]], n: int, seed: int) -> Dataset:
    """`n` prompts in the order in which training meets them: one random permutation of the rows after the other.

    Use it with `shuffle_dataset=False`.
    """
    epochs = -(-n // len(rows))
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch in range(epochs)])
    return Dataset.from_list([dict(row) for row in rows]).select(order[:n])


def fitting_rows(rows: Sequence[Mapping[str, Any]], tokenizer, max_tokens: int) -> list[Mapping[str, Any]]:
    """The rows whose prompt, rendered with the chat template if it is a conversation, has at most `max_tokens` tokens;
    says on stderr how many are left out. Raises ValueError if none is left."""
    if not rows:
        raise ValueError("there are no prompts")
    lengths = prompt_lengths([row["prompt"] for row in rows], tokenizer)
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_tokens]
    if not kept:
        raise ValueError(
            f"each of the {len(rows)} prompts has more than {max_tokens} tokens; the shortest: {min(lengths)}"
        )
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} prompts have more than {max_tokens} tokens: left out",
            file=sys.stderr,
        )
    return kept


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad(ids, padding_value=value, padding_side=side), pad(masks, padding_value=0, padding_side=side)
