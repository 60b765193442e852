"""Preference learning on the policy's own samples, from offline to online: sample -> score -> pair -> DPO.

One number says how stale the samples may be: every `sync_steps` = s optimizer steps the weights of the trained policy
are copied to the *generator*, which samples. s = 1 is online DPO, s = None (never) offline DPO, anything between
semi-online (Bridging Offline and Online Reinforcement Learning for LLMs, arXiv 2506.21495, Section 3).

    trainer = PreferenceTrainer(
        model,
        PreferenceConfig(**trainer_options(run), sync_steps=10, max_steps=200, per_device_train_batch_size=16),
        rows=[{"prompt": "2 + 2 =", "answer": "4"}, ...],
        reward=MathReward(),
        select=right_vs_wrong,
        tokenizer=tokenizer,
    )
    fit(trainer, run)

The loss, its metrics and the reference model are those of TRL's DPOTrainer, and so are their options: `beta`;
`loss_type=["sigmoid", "sft"]` with `loss_weights` adds the NLL of the chosen completion; `sync_ref_model=True,
ref_model_mixup_alpha=1.0, ref_model_sync_steps=s` moves the reference with the generator.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shared.experiments.errors import UserError
from shared.generation import Completion, SamplingParams
from shared.generation.text import complete, context_length, encode_prompts, engine_length, is_chat
from shared.generation.transformers_backend import TransformersSampler
from shared.rewards.contract import checked
from shared.training.pairs import Pool, Select

Reward = Callable[..., Sequence[float | None]]
"""TRL's signature: reward(prompts, completions, **columns)."""

GENERATOR, REFERENCE = "generator.pt", "reference.pt"


@dataclass
class PreferenceConfig(DPOConfig):
    """DPOConfig, and how samples are made. `per_device_train_batch_size` counts prompts; a step's B prompts are those
    of all its backward passes and processes. `max_steps` is needed."""

    sync_steps: int | None = field(
        default=1, metadata={"help": "s: steps between copies to the generator; None: never"}
    )
    num_generations: int = field(default=8, metadata={"help": "N: samples of each prompt"})
    entropy_weight: float = field(default=0.0, metadata={"help": "lambda_H: of the chosen completions' entropy"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest sample"})
    temperature: float = field(default=1.0, metadata={"help": "of the samples"})
    top_p: float = field(default=1.0, metadata={"help": "of the samples"})
    generation_batch_size: int = field(default=256, metadata={"help": "samples generated at a time"})
    prompts_per_call: int = field(default=1024, metadata={"help": "most prompts of an interval that are sampled ahead"})
    use_vllm: bool = field(default=False, metadata={"help": "sample with vLLM on the GPU instead of transformers"})
    vllm_mode: str = field(default="colocate", metadata={"help": "as in TRL: colocate, or server (`trl vllm-serve`)"})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "of the server"})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "share of the GPU for vLLM, colocate"})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs to an engine, colocate"})

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps < 1:
            raise UserError("max_steps: give the number of optimizer steps")
        if self.sync_steps is not None and self.sync_steps < 1:
            raise UserError(f"sync_steps must be at least 1, or None for never, not {self.sync_steps}")
        if self.num_generations < 2:
            raise UserError(f"num_generations: a pair needs at least 2 samples, not {self.num_generations}")
        if self.precompute_ref_log_probs:
            raise UserError("precompute_ref_log_probs: the samples do not exist before training")


class PreferenceTrainer(DPOTrainer):
    """DPO on samples that it makes itself.

    Optimizer step t (from 0) takes the next B rows of a random order of `rows` (a new order in each pass; a function
    of the seed and t alone), samples N completions of each from the generator, scores them with `reward`, lets `select`
    make pairs, and takes a step on

        (1 / B) sum over the pairs of -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected))

    (arXiv 2506.21495, Eq. 3, reduced as in its code: prompts without a pair count in B.) With `entropy_weight` each
    pair's term also gets minus that weight times `chosen_entropy`. All prompts of an interval between two copies are
    sampled in one call, up to `prompts_per_call`.

    Args:
        model: the policy, not wrapped; the generator and, if `ref_model` is None, the reference are copies of it as it
            is now.
        rows: each with `prompt` (text or chat messages) and the columns that the reward needs.
        reward: a callable with TRL's signature, called with the samples of a prompt next to each other.
        select: which completions of a pool make pairs.

    Logged beside DPO's metrics, of a step's samples: rollout/reward; rollout/length in tokens; rollout/entropy, minus
    the mean log-probability of the sampled tokens (at temperature 1 an unbiased estimate of the generator's mean
    next-token entropy, in nats); rollout/usable, the share of prompts that gave a pair; rollout/truncated,
    rollout/empty and rollout/unscored, shares of the samples; rollout/chosen_length and rollout/rejected_length of the
    pairs; rollout/staleness, steps since the last copy; and, summed since the process began, rollout/calls,
    rollout/tokens and rollout/seconds of generation. In the step that samples, what the reward gives to TRL's
    `log_metric` (shares of failures; of the first process's samples).

    Raises UserError naming the row for a prompt that does not fit into the model's context, and what `reward` raises.
    """

    def __init__(
        self,
        model,
        args: PreferenceConfig,
        *,
        rows: Sequence[Mapping[str, Any]],
        reward: Reward,
        select: Select,
        tokenizer,
        ref_model=None,
        callbacks: list | None = None,
    ):
        if not rows:
            raise UserError("there are no prompts to train on")
        for index, row in enumerate(rows):
            if "prompt" not in row:
                raise UserError(f"row {index} has no column 'prompt'; it has: {', '.join(sorted(row)) or 'none'}")
        self.rows, self.reward, self.select = rows, reward, select
        self.policy = model
        self._limits = model.config.get_text_config().vocab_size, context_length(model.config)
        if tokenizer.pad_token is None:  # Llama 3 has none
            tokenizer.pad_token = tokenizer.eos_token
        online = args.sync_steps == 1 and not args.use_vllm  # the policy itself samples
        frozen = None if online else _copy(model).eval().requires_grad_(False)
        super().__init__(
            model,
            _copy(model) if ref_model is None else ref_model,
            args,
            # A row per backward pass; what is in them comes from `_prepare_inputs`.
            train_dataset=Dataset.from_dict({"index": range(args.max_steps * args.gradient_accumulation_steps)}),
            processing_class=tokenizer,
            data_collator=DataCollatorForPreference(tokenizer.pad_token_id, max_length=None),
            callbacks=callbacks,
        )
        self.generator = self._make_generator(frozen)
        self._order: dict[int, np.ndarray] = {}
        self._pools: dict[int, list[list[Pool]]] = {}  # by step: one list of pools per backward pass
        self._spent: Counter[str] = Counter(calls=0, tokens=0, seconds=0.0)
        self._logged_step = -1

    # ---- prompts ----

    @property
    def prompts_per_step(self) -> int:
        """B."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def rows_at(self, step: int) -> list[int]:
        """Indices of the B rows of an optimizer step."""
        positions = range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step)
        return [int(self._permutation(p // len(self.rows))[p % len(self.rows)]) for p in positions]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._order:
            self._order = {e: order for e, order in self._order.items() if e >= epoch - 1}
            self._order[epoch] = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.rows))
        return self._order[epoch]

    # ---- rollouts ----

    def _sample_from(self, step: int) -> None:
        """Fills `_pools` from `step`'s part of its interval on."""
        interval = self.args.sync_steps or self.args.max_steps
        begin = step - step % interval
        if step == begin and self.args.sync_steps is not None:
            self.generator.copy_from(self)
        ahead = max(1, self.args.prompts_per_call // self.prompts_per_step)
        first = begin + (step - begin) // ahead * ahead
        steps = range(first, min(first + ahead, begin + interval, self.args.max_steps))
        mine = [self.rows_at(s)[self.args.process_index :: self.args.world_size] for s in steps]
        # Samples are a function of the seed and the first step: a resumed run makes the same ones again.
        pools = self.make_pools([index for indices in mine for index in indices], seed=_hash(self.args.seed, first))
        size = self.args.per_device_train_batch_size
        each = size * self.args.gradient_accumulation_steps
        for number, s in enumerate(steps):
            of_step = pools[number * each : (number + 1) * each]
            self._pools[s] = [of_step[start : start + size] for start in range(0, each, size)]

    def make_pools(self, indices: Sequence[int], seed: int) -> list[Pool]:
        """Samples of the generator for these rows, scored."""
        rows = [self.rows[i] for i in indices]
        prompts = [self._encode(self.rows[i], f"row {i}") for i in indices]
        begun = time.monotonic()
        found = self.generator.sample(prompts, self.args, seed)
        self._spent["seconds"] += time.monotonic() - begun
        self._spent["calls"] += 1
        self._spent["tokens"] += sum(len(c.token_ids) for completions in found for c in completions)
        rewards = self._score(rows, found)
        n = self.args.num_generations
        pools = []
        for k, (row, completions) in enumerate(zip(rows, found, strict=True)):
            pool = Pool(row, list(completions), rewards[k * n : (k + 1) * n])
            pools.append(replace(pool, pairs=self.select(pool)))
        return pools

    def _encode(self, row: Mapping, name: str) -> list[int]:
        """The prompt's token ids."""
        try:
            return encode_prompts([row["prompt"]], self.processing_class, *self._limits)[0]
        except (ValueError, TypeError) as error:
            where = f"{name}, item {row['item']}" if "item" in row else name
            raise UserError(f"{where}: {str(error).replace('prompt 0', 'its prompt')}") from error

    def _score(self, rows: Sequence[Mapping], found: Sequence[Sequence[Completion]]) -> list[float | None]:
        n = self.args.num_generations
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in rows for _ in range(n)] for name in names}
        prompts = [row["prompt"] for row in rows for _ in range(n)]
        completions = [
            [{"role": "assistant", "content": c.text}] if is_chat(row["prompt"]) else c.text
            for row, of_row in zip(rows, found, strict=True)
            for c in of_row
        ]
        ids = [c.token_ids for of_row in found for c in of_row]
        rewards = self.reward(
            prompts=prompts, completions=completions, completion_ids=ids, log_metric=self._log_metric, **columns
        )
        return checked(rewards, len(completions), getattr(self.reward, "__name__", "the reward"))

    def _log_metric(self, name: str, value: float) -> None:
        """What rewards call, as in TRL's GRPOTrainer."""
        self._metrics["train"][name].append(value)

    # ---- TRL's hooks ----

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        # Not sharded: each process goes through all numbers and takes its own part of each step's rows.
        return DataLoader(range(len(self.train_dataset)), batch_size=1, collate_fn=lambda index: {"index": index[0]})

    def floating_point_ops(self, inputs) -> int:
        return 0  # the numbers above say nothing about it

    def _prepare_inputs(self, inputs):
        step = self.state.global_step
        if step not in self._pools:
            self._pools.clear()
            self._sample_from(step)
        pools = self._pools[step][inputs["index"] % self.args.gradient_accumulation_steps]
        if self._logged_step != step:
            self._logged_step = step
            self._log_rollouts([pool for of_pass in self._pools[step] for pool in of_pass])
        return super()._prepare_inputs(self.build_inputs(pools))

    def build_inputs(self, pools: Sequence[Pool]) -> dict[str, Any]:
        """The batch of one backward pass: TRL's preference batch, and `pairs_per_prompt`, by which the mean over pairs
        becomes the sum over pairs divided by the number of prompts.

        Without any pair it holds one completion against itself with the weight 0, so that every process runs the
        forward and backward passes that the others wait for.
        """
        prompts = [self._encode(pool.row, "a row") for pool in pools]
        examples = [
            {
                "prompt_ids": prompt,
                "chosen_ids": pool.completions[chosen].token_ids,
                "rejected_ids": pool.completions[rejected].token_ids,
            }
            for prompt, pool in zip(prompts, pools, strict=True)
            for chosen, rejected in pool.pairs
        ]
        share = len(examples) / len(pools)
        if not examples:
            any_ids = pools[0].completions[0].token_ids
            examples = [{"prompt_ids": prompts[0], "chosen_ids": any_ids, "rejected_ids": any_ids}]
        return {**self.data_collator(examples), "pairs_per_prompt": share}

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        share = inputs.pop("pairs_per_prompt")
        if not self.args.entropy_weight:
            return super()._compute_loss(model, inputs, return_outputs) * share
        made = []  # the outputs that the loss is computed from; asked for them, TRL makes others, without entropy

        def forward(**batch):
            made.append(model(**batch))
            return made[-1]

        loss = super()._compute_loss(forward, inputs, return_outputs)
        entropy = chosen_entropy(made[0].entropy, inputs["completion_mask"][:, 1:])
        return (loss - self.args.entropy_weight * entropy.mean()) * share

    def _log_rollouts(self, pools: Sequence[Pool]) -> None:
        samples = [c for pool in pools for c in pool.completions]
        rewards = [r for pool in pools for r in pool.rewards if r is not None]
        logprobs = [x for c in samples for x in c.logprobs or []]
        interval = self.args.sync_steps or self.args.max_steps
        shares = {  # NaN where there is nothing to take the mean of: each process has a number for each
            "length": _mean(len(c.token_ids) for c in samples),
            "usable": _mean(bool(pool.pairs) for pool in pools),
            "truncated": _mean(c.finish_reason == "length" for c in samples),
            "empty": _mean(not c.text for c in samples),
            "unscored": 1 - len(rewards) / len(samples),
            "reward": _mean(rewards),
            "entropy": -_mean(logprobs),
        }
        for k, name in enumerate(("chosen", "rejected")):
            shares[f"{name}_length"] = _mean(len(p.completions[pair[k]].token_ids) for p in pools for pair in p.pairs)
        means = self.accelerator.gather(
            torch.tensor(list(shares.values()), dtype=torch.float64, device="cpu").to(self.accelerator.device).float()
        )
        for name, value in zip(shares, means.reshape(-1, len(shares)).nanmean(0).tolist(), strict=True):
            if value == value:
                self._metrics["train"][f"rollout/{name}"].append(value)
        self._metrics["train"]["rollout/staleness"].append(self.state.global_step % interval)
        for name, value in self._spent.items():
            self._metrics["train"][f"rollout/{name}"].append(value)

    # ---- resuming ----

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # A generator or reference that never moves is made anew from the policy that training starts from.
        if self.args.sync_steps is not None and self.generator.model is not None:
            self._save_weights(self.generator.model, directory / GENERATOR)
        if self.args.sync_ref_model:
            self._save_weights(self.ref_model, directory / REFERENCE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, part in ((GENERATOR, self.generator.model), (REFERENCE, self.ref_model)):
            path = Path(resume_from_checkpoint) / name
            if path.exists():
                _set_weights(part, torch.load(path, map_location="cpu", mmap=True))

    def _save_weights(self, model, path: Path) -> None:
        weights = _weights(model)  # a joint effort where the model is sharded
        if self.accelerator.is_main_process:
            torch.save(weights, path)
        self.accelerator.wait_for_everyone()

    # ---- generators ----

    def _make_generator(self, frozen) -> Generator:
        if self.args.use_vllm:
            return VLLMGenerator(self)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("a sharded policy cannot sample with transformers: set use_vllm")
        if frozen is not None:
            frozen.to(self.accelerator.device)
        return LocalGenerator(self, frozen)


def chosen_entropy(entropy_MT: torch.Tensor, mask_MT: torch.Tensor) -> torch.Tensor:
    """H = mean over a response's tokens of the policy's next-token entropy, for the chosen responses alone (the entropy
    regularisation of arXiv 2506.21495, as its code reduces it).

    Args:
        entropy_MT: in nats, of the distributions that the tokens were drawn from; the first half of the M sequences
            are the chosen ones.
        mask_MT: 1 where the token belongs to the response.

    Returns: `[M / 2]`; 0 for an empty response.
    """
    entropy_PT, mask_PT = entropy_MT.chunk(2)[0], mask_MT.chunk(2)[0]
    return (entropy_PT * mask_PT).sum(1) / mask_PT.sum(1).clamp(min=1)


class Generator(Protocol):
    """What samples: `copy_from` renews its weights. `model`: the weights that a resumed run has to get back, if any."""

    model: Any

    def copy_from(self, trainer: PreferenceTrainer) -> None: ...

    def sample(self, prompts: list[list[int]], args: PreferenceConfig, seed: int) -> list[list[Completion]]: ...


class LocalGenerator:
    """Samples with transformers in each process: from a copy of the policy, or (model None) from the policy itself."""

    def __init__(self, trainer: PreferenceTrainer, model):
        self.model = model
        size = trainer.args.generation_batch_size
        self.sampler = TransformersSampler(model or trainer.policy, trainer.processing_class, batch_size=size)

    def copy_from(self, trainer: PreferenceTrainer) -> None:
        if self.model is not None:
            with torch.no_grad():
                for mine, theirs in zip(self.model.parameters(), trainer.policy.parameters(), strict=True):
                    mine.copy_(theirs)

    def sample(self, prompts: list[list[int]], args: PreferenceConfig, seed: int) -> list[list[Completion]]:
        params = SamplingParams(args.max_new_tokens, args.temperature, args.top_p, seed=seed, logprobs=True)
        return self.sampler.sample(prompts, args.num_generations, params)


class VLLMGenerator:
    """Samples with TRL's vLLM engine, on this process's GPU or on a server; until the first copy its weights are those
    of the checkpoint that the policy was loaded from.

    vLLM draws from random numbers of its own: repeating a run does not repeat its samples. After a kill the engine
    gets the resumed policy's weights, so the rest of an interval is sampled from a fresher policy.
    """

    model = None

    def __init__(self, trainer: PreferenceTrainer):
        from trl.generation.vllm_generation import VLLMGeneration

        args = trainer.args
        self.tokenizer = trainer.processing_class
        length = None  # a server has its own
        if args.vllm_mode == "colocate":
            prompts = [row["prompt"] for row in trainer.rows]
            length = engine_length(prompts, self.tokenizer, args.max_new_tokens, trainer._limits[1])
        self.engine = VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            temperature=args.temperature,
            top_p=args.top_p,
            max_completion_length=args.max_new_tokens,
            max_model_length=length,
            logprobs=0,
        )

    def copy_from(self, trainer: PreferenceTrainer) -> None:
        self.engine.sync_weights()

    def sample(self, prompts: list[list[int]], args: PreferenceConfig, seed: int) -> list[list[Completion]]:
        n = args.num_generations
        repeated = [ids for ids in prompts for _ in range(n)]
        _, completion_ids, logprobs, _ = self.engine.generate(repeated, images=None, num_generations=n)
        ends = self.tokenizer.eos_token_id
        found = [
            complete(
                self.tokenizer,
                list(ids),
                [row[0] for row in rows],
                "stop" if len(ids) < args.max_new_tokens or ids[-1] == ends else "length",
                (),
            )
            for ids, rows in zip(completion_ids, logprobs, strict=True)
        ]
        return [found[k * n : (k + 1) * n] for k in range(len(prompts))]


def _mean(values: Iterable[float]) -> float:
    """NaN of none."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _copy(model):
    """A copy with a forward of its own: trainers patch that of their models, and a copied patch runs the original."""
    copied = copy.deepcopy(model)
    vars(copied).pop("forward", None)
    return copied


def _weights(model) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _set_weights(model, weights: dict[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def _hash(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
