"""Train one arm of Coconut: the multi-stage curriculum of Section 3.

    python -m papers.coconut.train --scale tiny --arm coconut --seed 0

Stage s trains on examples whose first s reasoning steps are replaced by s·c continuous thoughts, with a new optimizer.
Every arm takes the same number of optimizer steps on the same number of examples.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from papers.coconut.config import Config
from papers.coconut.method import (
    ARMS,
    Batches,
    Curriculum,
    draw_stages,
    icot_offsets,
    special_ids,
    tokenize_rows,
)
from shared.experiments import Run, UserError, stage_main

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of the curriculum.

    Attributes:
        ends: the step at which each stage ends.
        per_epoch: steps of a pass over the training data.
    """

    ends: list[int]
    per_epoch: int

    @property
    def total(self) -> int:
        return self.ends[-1]

    def stage(self, step: int) -> int:
        return sum(end <= step for end in self.ends)

    def starts_stage(self, step: int) -> bool:
        return step == 0 or step in self.ends

    def since_stage(self, step: int) -> tuple[int, int]:
        """(steps since the stage began, steps of the stage)."""
        start, end = next((a, b) for a, b in pairwise([0, *self.ends]) if step < b)
        return step - start, end - start


def make_schedule(config: Config, n_examples: int) -> Schedule:
    per_epoch = math.ceil(n_examples / config.batch_size)
    lengths = config.stage_steps or [epochs * per_epoch for epochs in config.stage_epochs]
    if ARMS[config.method].stages in ("first", "last"):  # no curriculum: one stage of the same total
        lengths = [sum(lengths)]
    if min(lengths) < 1:
        raise UserError(
            f"every stage needs at least one step or epoch, got {config.stage_steps or config.stage_epochs}"
        )
    return Schedule(list(np.cumsum(lengths).tolist()), per_epoch)


def train(config: Config, run: Run) -> dict[str, float]:
    """Trains, keeps a resumable state, and writes run.checkpoint. Returns the final development accuracy and loss."""
    from accelerate import Accelerator

    from papers.coconut.evaluation import accuracy
    from papers.coconut.tasks import load_model, load_rows

    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
    train_rows, dev_rows = load_rows(config, "train"), load_rows(config, "dev")
    model, tokenizer = load_model(config)
    curriculum = Curriculum(config.method, config.c_thought, config.max_latent_stage, config.pad_latent_to_max)
    ids = special_ids(tokenizer)
    batches = Batches(tokenize_rows(train_rows, tokenizer, f"{config.task} train"), curriculum, ids)
    batches.check_positions(model.config.get_text_config().max_position_embeddings)
    dev = Batches(tokenize_rows(dev_rows, tokenizer, f"{config.task} dev"), curriculum, ids)
    schedule = make_schedule(config, len(batches.data))

    model.to(accelerator.device)
    wrapped = accelerator.prepare(model)
    optimizer = new_optimizer(config, model)
    step, best, loss = 0, -1.0, math.nan
    if state := run.load_state():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, best, loss = state["step"], state["best"], state["loss"]

    while step < schedule.total:
        if resets(config, batches, schedule, step):
            optimizer = new_optimizer(config, model)
        set_learning_rate(config, schedule, optimizer, step)
        loss = optimizer_step(config, batches, schedule, wrapped, optimizer, accelerator, run.seed, step)
        step += 1
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: lower lr, raise warmup_steps or set clip")
        if step % max(1, schedule.total // 200) == 0 or step == schedule.total:
            run.log(step, schedule.total, loss=round(loss, 5), curriculum_stage=schedule.stage(step - 1))
        if config.select_best and step % schedule.per_epoch == 0 and schedule.stage(step - 1) == len(schedule.ends) - 1:
            found = accuracy(model, tokenizer, dev, dev_rows, config)
            if found > best:
                best = found
                save_checkpoint(run, model, tokenizer)
        if run.due():
            run.save_state(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "best": best,
                    "loss": loss,
                }
            )

    if best < 0:
        best = accuracy(model, tokenizer, dev, dev_rows, config)
        save_checkpoint(run, model, tokenizer)
    accelerator.wait_for_everyone()
    return {"loss": loss, "dev_accuracy": best, "steps": step}


def new_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    import torch

    betas = (0.9, config.beta2)
    return torch.optim.AdamW(model.parameters(), config.lr, betas, weight_decay=config.weight_decay, fused=True)


def resets(config: Config, batches: Batches, schedule: Schedule, step: int) -> bool:
    match config.reset_optimizer:
        case "stage" if ARMS[config.method].stages == "tokens":  # its stages are the numbers of removed tokens
            return step == 0 or removed_tokens(batches, schedule, step) != removed_tokens(batches, schedule, step - 1)
        case "stage":
            return schedule.starts_stage(step)
        case "epoch":
            return step % schedule.per_epoch == 0
    return False


def set_learning_rate(config: Config, schedule: Schedule, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Warm-up after each optimizer reset at a new stage, then constant or falling linearly to a tenth at its end."""
    done, length = schedule.since_stage(step)
    lr = config.lr * min(1.0, (done + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "linear":
        lr *= 1 - 0.9 * done / length
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(
    config: Config,
    batches: Batches,
    schedule: Schedule,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator,
    seed: int,
    step: int,
) -> float:
    """One update on this process's share of the batch; returns its mean loss."""
    rows_B, stage_B = draw_batch(config, batches, schedule, seed, step)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    micro = list(split_micro(rows_B[mine], stage_B[mine], config.micro_batch_size))
    model.train()
    optimizer.zero_grad()
    total = 0.0
    for i, (rows, stages) in enumerate(micro):
        batch = {key: tensor.to(accelerator.device) for key, tensor in batches.train(rows, stages).items()}
        last = i == len(micro) - 1
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(model):
            loss = model(**batch).loss * (len(rows) / len(rows_B[mine]))
        accelerator.backward(loss)
        total += loss.item()
    if config.clip is not None:
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return total


def draw_batch(
    config: Config, batches: Batches, schedule: Schedule, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The examples of an optimizer step, `[B]`, and the stage each is shown in: a function of seed and step alone.

    So training resumes anywhere without replaying what came before.
    """
    data = batches.data
    epoch, position = divmod(step, schedule.per_epoch)
    rows_B = epoch_order(seed, epoch, len(data))[position * config.batch_size :][: config.batch_size]
    rng = np.random.default_rng([seed, 1, step])
    if ARMS[config.method].stages == "tokens":
        return rows_B, removed_tokens(batches, schedule, step) + icot_offsets(rng, len(rows_B))
    stage = schedule.stage(step)
    mixing = config.uniform_prob if stage >= config.mix_from_stage else 0.0
    return rows_B, draw_stages(rng, stage, data.n_steps_N[rows_B], mixing, config.mix_batches)


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, n_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(n_examples)


def removed_tokens(batches: Batches, schedule: Schedule, step: int) -> int:
    """Tokens of the reasoning that `icot` has removed: none in stage 0, then one after the other at a constant rate,
    all of them where Coconut's last stage begins (when is inferred; that it is linear is Deng et al.'s)."""
    begin, end = schedule.ends[0], schedule.ends[max(0, len(schedule.ends) - 2)]
    most = int(batches.data.cuts_NS.max())
    return min(most, max(0, step - begin) * most // max(1, end - begin))


def split_micro(rows: np.ndarray, stages: np.ndarray, size: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size], stages[start : start + size]


def save_checkpoint(run: Run, model, tokenizer) -> None:
    """Replaces run.checkpoint; a kill in between leaves the old one or the new one."""
    if not run.is_main_process:
        return
    new, old = Path(f"{run.checkpoint}.new"), Path(f"{run.checkpoint}.old")
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if run.checkpoint.exists():
        run.checkpoint.rename(old)
    new.rename(run.checkpoint)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    stage_main("train", Config, train)
