"""The policy that all arms of an experiment start from: partially competent, skewed, and the same for each of them."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.experiments import files
from shared.experiments.keys import stage_key
from shared.experiments.paper import ROOT
from shared.experiments.run import Run

if TYPE_CHECKING:
    import torch


def starting_policy(
    run: Run, config: Mapping[str, Any], build: Callable[[Path], Mapping[str, float]], *, seed: int
) -> Path:
    """The directory of the checkpoint that `build` makes; made by the run that comes first, others wait for it.

    It stands in runs/PAPER/SCALE/starting_policies/KEY, and KEY stands for `config`, `seed`, and the code that the
    module of `build` imports: if none of them changes, it is made once. Any checkpoint will do, so what an experiment
    learns before its arms part (a reward model, a classifier) can be made in the same way.

    Args:
        config: everything that `build` depends on.
        build: trains, saves into the given directory, and returns what it measured. It must draw its random numbers
            from `seed`, and raise UserError if the policy is not as competent as the experiment needs it.

    The measured numbers are in `starting_policy.json` in the directory (`measured`).
    """
    function = build.func if isinstance(build, partial) else build
    module = Path(sys.modules[function.__module__].__file__)
    key = stage_key(module, dict(config), ["starting policy", function.__qualname__, str(seed)], _root(module))
    directory = _home(run) / "starting_policies" / key
    if not (directory / RECORD).exists() and run.is_main_process:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Unlike `files.lock`, this waits. The system lets go of it however the process ends.
        with open(directory.parent / f".{key}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / RECORD).exists():
                _build(directory, build, config, seed)
    while not (directory / RECORD).exists():  # the other processes of a distributed run
        time.sleep(0.2)
    return directory


RECORD = "starting_policy.json"


def measured(directory: Path) -> dict[str, float]:
    """What `build` measured of the policy in `directory`."""
    return files.read_json(directory / RECORD)["measured"]


def _build(directory: Path, build: Callable, config: Mapping[str, Any], seed: int) -> None:
    new = directory.with_name(f"{directory.name}.new")
    for path in (new, directory):
        shutil.rmtree(path, ignore_errors=True)
    new.mkdir()
    numbers = {name: float(value) for name, value in build(new).items()}
    files.write_json(new / RECORD, {"config": dict(config), "seed": seed, "measured": numbers})
    new.rename(directory)


def _home(run: Run) -> Path:
    """runs/PAPER/SCALE; for a run that was put elsewhere, its own directory."""
    standard = run.dir.name == str(run.seed) and run.dir.parent.name == run.arm
    return run.dir.parents[1] if standard else run.dir


def _root(module: Path) -> Path:
    """The repository: the module's ancestor that holds `papers` or `shared`."""
    return next((p.parent for p in module.resolve().parents if p.name in ("papers", "shared")), ROOT)


def sft(
    model,
    tokenizer,
    examples: Sequence[tuple[str, str]],
    *,
    directory: Path,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
) -> float:
    """Supervised fine-tuning in place, through TRL's SFTTrainer: cosine schedule, loss on completions and their
    end-of-sequence token alone.

    Args:
        examples: (prompt, completion) pairs of text.
        directory: for the trainer's own files; nothing stays there.
        batch_size: examples per optimizer step.

    Returns: the mean loss over the last tenth of the steps, in nats per token.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from shared.training.runs import cosine_options, fit_tiles, train_whole

    if not examples:
        raise ValueError("there are no examples to learn from")
    prompts, completions = (_token_ids(tokenizer, texts) for texts in zip(*examples, strict=True))
    eos = [tokenizer.eos_token_id]
    rows = {
        "input_ids": [p + c + eos for p, c in zip(prompts, completions, strict=True)],
        "labels": [[-100] * len(p) + c + eos for p, c in zip(prompts, completions, strict=True)],
    }
    schedule = {"steps": steps, "batch_size": batch_size, "lr": lr, "warmup_steps": warmup_steps, "seed": seed}
    options = SFTConfig(
        **cosine_options(directory / "sft", **schedule, weight_decay=weight_decay, max_length=None),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model,
        options,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        data_collator=partial(collate, pad_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id),
    )
    fit_tiles(model)
    return train_whole(trainer)[-1]


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """What TRL's collator makes of `input_ids` and `labels`, padded on the right, in a tenth of its time."""
    import numpy as np
    import torch

    size = len(rows), max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": np.full(size, pad_id, dtype=np.int64),
        "labels": np.full(size, -100, dtype=np.int64),
        "attention_mask": np.zeros(size, dtype=np.int64),
    }
    for b, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][b, :length] = row["input_ids"]
        batch["labels"][b, :length] = row["labels"]
        batch["attention_mask"][b, :length] = 1
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _token_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """tokenizer(texts)["input_ids"]; a fast tokenizer without its wrapper takes a third of the time."""
    if not tokenizer.is_fast:
        return tokenizer(list(texts), return_attention_mask=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]
