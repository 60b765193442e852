"""TRL and transformers trainers inside a stage (`Run`): one log, one way to resume, one kind of checkpoint."""

from __future__ import annotations

import functools
import shutil
import time
from numbers import Real
from pathlib import Path
from typing import Any

import accelerate.utils.modeling
import torch
import trl.trainer.utils
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from shared.experiments.run import SAVE_SHARE, Run

TRAINER = "trainer"  # the trainer's directory in the run's
WIDEST_TILE = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE

# TRL's losses ask at each step whether the model is PEFT's; accelerate reads the package's metadata each time (2 ms).
accelerate.utils.modeling.is_peft_available = functools.cache(accelerate.utils.modeling.is_peft_available)


def trainer_options(run: Run, **options: Any) -> dict[str, Any]:
    """Keyword arguments for any config of transformers or TRL; `options` are added to them or replace them.

    Those of `plain_options`, with the run's seed and a log row at each step; `fit` makes the checkpoints.
    """
    return plain_options(run.dir / TRAINER, **{"seed": run.seed, "logging_steps": 1, **options})


def plain_options(directory: Path, **options: Any) -> dict[str, Any]:
    """Keyword arguments for any config of transformers or TRL; `options` are added to them or replace them.

    Float32 without gradient checkpointing (TRL's defaults are bf16 with it) on whatever device there is, no reports to
    other services, no checkpoints.
    """
    return {
        "output_dir": str(directory),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **options,
    }


def cosine_options(
    directory: Path, *, steps: int, batch_size: int, lr: float, warmup_steps: int, seed: int, **options: Any
) -> dict[str, Any]:
    """`plain_options` of what is trained before the arms part (`train_whole`): cosine schedule, and a log row for each
    tenth of the steps."""
    return plain_options(
        directory,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        seed=seed,
        logging_steps=max(1, steps // 10),
        **options,
    )


def train_whole(trainer: Trainer) -> list[float]:
    """`trainer.train()` from beginning to end, outside of any run's log; nothing stays in its output directory.

    Returns: the loss of each row of its log, a mean over `logging_steps`.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def fit_tiles(model: PreTrainedModel) -> None:
    """Makes TRL's output layer as fast for a small vocabulary as it is for a large one; what it computes is the same.

    TRL lays the logits out in rows of 32,768 tokens, whatever the vocabulary. With one of 50 words each row lies in
    memory pages of its own, and touching them took a fifth of a training step on a CPU. Elsewhere nothing is changed.
    """
    vocabulary = model.config.get_text_config().vocab_size
    width = -(-vocabulary // 64) * 64 if model.device.type == "cpu" else WIDEST_TILE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(WIDEST_TILE, width)


def fit(trainer: Trainer, run: Run, save_every: float = 20.0) -> None:
    """`trainer.train()`, logged to the run and resumable.

    A run that was killed goes on from its last state and ends with the numbers of one that was not. Needs the options
    of `trainer_options`. Only models that training started from must be made before; what the trainer keeps beside
    model, optimizer, scheduler and random state it must save and load with its checkpoints itself.

    Args:
        save_every: seconds between states, more if saving is slow.
    """
    directory = Path(trainer.args.output_dir)
    state = run.load_state()
    resume = directory / state["checkpoint"] if state else None
    if run.is_main_process:
        _remove_checkpoints(directory, keep=resume)
    trainer.accelerator.wait_for_everyone()
    fit_tiles(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_RunCallback(trainer, run, save_every))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.accelerator.wait_for_everyone()
    if run.is_main_process:
        shutil.rmtree(directory, ignore_errors=True)


def save_policy(trainer: Trainer, tokenizer, run: Run, path: Path | None = None) -> None:
    """Writes an ordinary Hugging Face checkpoint of the trainer's model, whole or not at all, to `path` (default:
    run.checkpoint)."""
    path = path or run.checkpoint
    new = path.with_name(f"{path.name}.new")
    if run.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    trainer.save_model(str(new))
    trainer.accelerator.wait_for_everyone()
    if run.is_main_process:
        (new / "training_args.bin").unlink(missing_ok=True)  # holds absolute paths, and is not part of the policy
        tokenizer.save_pretrained(new)
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
    trainer.accelerator.wait_for_everyone()


def copy_policy(source: Path | str, run: Run) -> None:
    """Writes run.checkpoint as a copy of the checkpoint in `source`: the arm that does not train."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not run.is_main_process:
        return
    new = Path(f"{run.checkpoint}.new")
    shutil.rmtree(new, ignore_errors=True)
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(new)
    AutoTokenizer.from_pretrained(source).save_pretrained(new)
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    new.rename(run.checkpoint)


def load_policy(source: Path | str, **options: Any) -> tuple[PreTrainedModel, Any]:
    """Model, in float32 unless `options` name another dtype, and tokenizer of a checkpoint directory or hub name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(source, **{"dtype": torch.float32, **options}), tokenizer


class _RunCallback(TrainerCallback):
    """Log rows and states of a trainer go to the run."""

    def __init__(self, trainer: Trainer, run: Run, save_every: float):
        self.trainer, self.run, self.save_every = trainer, run, save_every
        self.save_seconds = 0.0

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, Real) and k not in ("epoch", "step")}
        # The trainer's last row only sums up (runtime and the like).
        if numbers and "train_runtime" not in numbers:
            rounded = {
                key: value if isinstance(value, int) else float(f"{value:.6g}") for key, value in numbers.items()
            }
            self.run.log(state.global_step, state.max_steps, **rounded)

    def on_step_end(self, args, state, control, **kwargs):
        due = self.run.due(max(self.save_every, SAVE_SHARE * self.save_seconds))
        if self.trainer.accelerator.num_processes > 1:  # saving is a joint effort: rank 0's clock decides
            due = broadcast_object_list([due])[0]
        if due and state.global_step < state.max_steps:
            self.begun = time.monotonic()
            control.should_save = True
        return control

    def on_save(self, args, state, control, **kwargs) -> None:
        name = f"checkpoint-{state.global_step}"
        self.trainer.accelerator.wait_for_everyone()
        # From here on the new checkpoint counts, and the old one is of no use.
        self.run.save_state({"checkpoint": name})
        if self.run.is_main_process:
            _remove_checkpoints(Path(args.output_dir), keep=Path(args.output_dir) / name)
        self.save_seconds = time.monotonic() - self.begun


def _remove_checkpoints(directory: Path, keep: Path | None) -> None:
    for path in directory.glob("checkpoint-*"):
        if path != keep:
            shutil.rmtree(path)
