"""Train one arm of MTA on find-block, Python's documentation or SlimPajama.

    python -m papers.mta.train --scale tiny --arm first_mta --seed 0

Every arm of a task sees the same batches in the same order. The loop is written out because a streamed
corpus has to go on where it was: transformers' Trainer would read everything again up to there.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

from papers.mta.config import Config, Finetune
from shared.experiments import Run, UserError, stage_main

PRETRAINED = "pretrained"  # the checkpoint between the two stages of a run with `finetune`


def stages(config: Config, run: Run) -> list[Config]:
    """One config per training stage; the second one starts from the first one's checkpoint.

    Longer sequences are fewer to a batch: the tokens of a step stay the same (inferred).
    """
    if config.finetune.steps == 0:
        return [config]
    second = config.finetune
    model = dataclasses.replace(config.model, rope_theta=second.rope_theta)
    if second.retrofit:
        model = dataclasses.replace(model, attention="mta")
    longer = second.context_length / config.context_length
    changes = {k: getattr(second, k) for k in ("steps", "context_length", "weight_decay", "warmup_steps")}
    changes["batch_size"] = max(1, round(config.batch_size / longer))
    if config.micro_batch_size:
        changes["micro_batch_size"] = max(1, round(config.micro_batch_size / longer))
    first = str(run.dir / PRETRAINED)
    return [config, dataclasses.replace(config, **changes, model=model, init_from=first, finetune=Finetune())]


def train(config: Config, run: Run) -> dict[str, float]:
    """Trains, keeps a resumable state, and writes run.checkpoint. Returns the last loss and development score."""
    from accelerate import Accelerator

    # Not accelerate's mixed precision: under FSDP it would cast the kernels, too, to bfloat16, where small changes of
    # the identity vanish. `autocast` below leaves them alone.
    accelerator = Accelerator(mixed_precision="no")
    parts = stages(config, run)
    saved = run.load_state()
    metrics = {}
    for number in range(saved["stage"] if saved else 0, len(parts)):
        last = number == len(parts) - 1
        target = run.checkpoint if last else run.dir / PRETRAINED
        resumes = saved is not None and saved["stage"] == number
        metrics = train_stage(parts, number, target, accelerator, run, resumes)
        accelerator.wait_for_everyone()
    return metrics


def train_stage(
    parts: list[Config], number: int, target: Path, accelerator, run: Run, resumes: bool
) -> dict[str, float]:
    """Trains stage `number` and writes its checkpoint to `target`; `resumes` from the run's saved state."""
    from papers.mta.tasks import build_model, tokenizer_of, training_batches

    config = parts[number]
    before, total = sum(part.steps for part in parts[:number]), sum(part.steps for part in parts)
    tokenizer = tokenizer_of(config)
    batches = training_batches(config, tokenizer, run.seed, accelerator.process_index, accelerator.num_processes)
    dev_score = development(config, tokenizer)
    model = build_model(config, tokenizer).to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, new_optimizer(config, model))
    step = 0
    if resumes:
        state = run.load_state()  # again: it puts the random generators back
        step = state["step"]
        set_state(wrapped, optimizer, state)
        batches.load_state_dict(state["batches"][accelerator.process_index])

    metrics: dict[str, float] = {}
    while step < config.steps:
        set_learning_rate(config, optimizer, step)
        loss = optimizer_step(config, batches.take(step), wrapped, optimizer, accelerator)
        step += 1
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {before + step}: lower lr or raise warmup_steps")
        end = step == config.steps
        if step % config.eval_every == 0 or end:
            metrics = {"loss": accelerator_mean(accelerator, loss), **dev_score(accelerator.unwrap_model(wrapped))}
            run.log(before + step, total, **{name: round(value, 5) for name, value in metrics.items()})
        elif step % max(1, total // 100) == 0:
            run.log(before + step, total, loss=round(loss, 5))
        if not end and is_due(run, accelerator, step, max(1, total // 100)):
            values = {"stage": number, "step": step, "batches": gathered(accelerator, batches.state_dict())}
            run.save_state({**values, **get_state(wrapped, optimizer)})
    weights = get_state(wrapped)["model"]
    if run.is_main_process:
        save_checkpoint(target, accelerator.unwrap_model(wrapped), tokenizer, weights)
    accelerator.free_memory()
    return {**metrics, "steps": before + step}


def new_optimizer(config: Config, model):
    """AdamW; the paper's weight decay also pulls at the kernels, away from the identity, unless they have their own."""
    import torch

    named = dict(model.named_parameters())
    groups = [{"params": list(named.values())}]
    if config.kernel_weight_decay is not None:
        kernels = [name for name in named if ".kernels." in name]
        groups = [
            {"params": [named.pop(name) for name in kernels], "weight_decay": config.kernel_weight_decay},
            {"params": list(named.values())},
        ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
    )


def set_learning_rate(config: Config, optimizer, step: int) -> None:
    """Linear warm-up, then constant or linearly to 0 after the last step."""
    lr = config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "linear" and step >= config.warmup_steps:
        lr *= (config.steps - step) / (config.steps - config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(config: Config, device):
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)


def optimizer_step(config: Config, batch: dict, model, optimizer, accelerator) -> float:
    """One update on this process's share of the batch; returns its mean loss."""
    n = len(batch["input_ids"])
    size = config.micro_batch_size or n
    model.train()
    optimizer.zero_grad()
    total = 0.0
    for start in range(0, n, size):
        micro = {key: x[start : start + size].to(accelerator.device) for key, x in batch.items()}
        last = start + size >= n
        with nullcontext() if last else accelerator.no_sync(model):
            with autocast(config, accelerator.device):
                loss = model(**micro, use_cache=False).loss * (len(micro["input_ids"]) / n)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return float(total)


def development(config: Config, tokenizer):
    """A function of the model: its error on find-block contexts that are not test items, or its loss on the first
    validation sequences. It is logged and decides nothing."""
    from papers.mta.evaluators import sequence_nll
    from papers.mta.tasks import find_block, validation_sequences

    if config.task == "findblock":
        from papers.mta.eval import find_block_logits

        batch = find_block(config).test_batch(config.n_dev, seed=1)

        def error(model) -> dict[str, float]:
            with autocast(config, model.device):
                return {"error": float(batch.errors(find_block_logits(model, batch, config)).float().mean())}

        return error

    few = dataclasses.replace(config, n_validation=config.n_dev)
    sequences, _ = validation_sequences(few, tokenizer)

    def nll(model) -> dict[str, float]:
        with autocast(config, model.device):
            found = [sequence_nll(model, ids, batch_size=config.eval_batch_size) for ids in sequences.values()]
        return {"nll": float(sum(nll.sum() for nll, _ in found) / sum(tokens.sum() for _, tokens in found))}

    return nll


# ---- state and checkpoints ------------------------------------------------------------------------------------------
def get_state(model, optimizer=None) -> dict:
    """Whole state dicts, gathered on rank 0 whether the model is plain, replicated or sharded; all ranks call it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {"model": get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
    return state


def set_state(model, optimizer, state: dict) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer.optimizer, state["optimizer"], options=options)


def is_due(run: Run, accelerator, step: int, every: int) -> bool:
    """Whether to save now, asked every few steps; rank 0's clock decides for all."""
    if accelerator.num_processes == 1:
        return run.due()
    if step % every:
        return False
    from accelerate.utils import broadcast_object_list

    (answer,) = broadcast_object_list([run.due()])
    return answer


def gathered(accelerator, value) -> list:
    """One value per process."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def accelerator_mean(accelerator, value: float) -> float:
    import torch

    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean"))


def save_checkpoint(target: Path, model, tokenizer, weights: dict) -> None:
    """Replaces `target`; a kill in between leaves the old one or the new one."""
    new, old = Path(f"{target}.new"), Path(f"{target}.old")
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    # Gathered from shards, tied weights no longer are one tensor: save them once all the same.
    weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(new, state_dict=weights)
    tokenizer.save_pretrained(new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    stage_main("train", Config, train)
