"""From a config to what a run needs: tokenizer, model, training batches, validation sequences."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from papers.mta import data, evaluators
from papers.mta.config import Config
from shared.experiments import UserError, files
from shared.experiments.paper import ROOT

CACHE = ROOT / "runs" / "mta" / "cache"


def find_block(config: Config) -> data.FindBlock:
    names = ("answer", "block_size", "n_blocks", "min_blocks", "n_queries")
    return data.FindBlock(**{name: getattr(config, name) for name in names})


# ---- text -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Docs:
    """Python's documentation, ready for training.

    train_ids, train_labels, validation_ids: (n, context_length) tokens. Sequences with needles come last in training.
    haystack: the validation documents as one text.
    """

    tokenizer: object
    train_ids: torch.Tensor
    train_labels: torch.Tensor
    validation_ids: torch.Tensor
    haystack: str


def load_docs(config: Config) -> Docs:
    """Builds `Docs`, once: reading the standard library takes longer than a small model's training."""
    names = ("with_source", "vocab_size", "context_length", "needle_share", "needles")
    parts = [sys.version, *(f"{name}={getattr(config, name)}" for name in names)]
    parts += [Path(module.__file__).read_text(encoding="utf-8") for module in (data, evaluators)]
    parts.append(Path(__file__).read_text(encoding="utf-8"))
    path = CACHE / f"docs-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        return torch.load(path, weights_only=False)
    docs = build_docs(config)
    buffer = io.BytesIO()
    torch.save(docs, buffer)
    files.write_atomic(path, lambda file: file.write(buffer.getvalue()), binary=True)
    return docs


def build_docs(config: Config) -> Docs:
    train, validation = data.docs_corpus(config.with_source)
    tokenizer = data.train_tokenizer((document.text for document in train), config.vocab_size)
    train_ids = data.pack((document.text for document in train), tokenizer, config.context_length)
    labels = train_ids
    if config.needle_share > 0:
        n = round(len(train_ids) * config.needle_share / (1 - config.needle_share))
        text = "\n\n".join(document.text for document in train)
        ids, with_needles = needle_sequences(text, tokenizer, config, n)
        train_ids, labels = torch.cat([train_ids, ids]), torch.cat([labels, with_needles])
    validation_ids = data.pack((document.text for document in validation), tokenizer, config.context_length)
    return Docs(tokenizer, train_ids, labels, validation_ids, "\n\n".join(d.text for d in validation))


def needle_sequences(text: str, tokenizer, config: Config, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, context_length) tokens and labels of texts with 1 to max(config.needles) needles, question and answer."""
    rng = np.random.default_rng(3)
    ids = torch.full((n, config.context_length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, data.IGNORED)
    for row in range(n):
        n_needles = int(rng.integers(1, max(config.needles, default=1) + 1))
        (example,) = draw_needles(text, tokenizer, config.context_length, n_needles, [rng.random()], 1, rng)
        tokens = torch.tensor(tokenizer(example.document, verbose=False)["input_ids"])[: config.context_length]
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    return ids, labels


def draw_needles(
    text: str, tokenizer, context_length: int, n_needles: int, depths: list[float], n: int, rng: np.random.Generator
) -> list[evaluators.NeedleExample]:
    """`n` examples in pieces of `text` that start anywhere, the depths in turn."""
    window = 8 * context_length  # characters; tokens are shorter
    examples = []
    for i in range(n):
        start = int(rng.integers(0, max(1, len(text) - window)))
        piece = text[start : start + window]
        examples.append(
            evaluators.needle_example(piece, tokenizer, context_length, n_needles, depths[i % len(depths)], rng)
        )
    return examples


def load_tokenizer(config: Config):
    """The tokenizer of a SlimPajama run."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.init_from)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{config.tokenizer or config.init_from}: the tokenizer has no end-of-sequence token")
    return tokenizer


def validation_sequences(config: Config, tokenizer) -> tuple[dict[str, torch.Tensor], str]:
    """Domain -> (n, context_length) tokens, and their text as a haystack."""
    if config.task == "docs":
        docs = load_docs(config)
        return {"docs": docs.validation_ids[: config.n_validation]}, docs.haystack
    rows = data.load_rows(config.dataset, "validation", streaming=True)
    sequences = data.domain_sequences(rows, tokenizer, config.context_length, config.n_validation)
    haystack = "\n\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in next(iter(sequences.values())))
    return sequences, haystack


# ---- training batches -----------------------------------------------------------------------------------------------
Batch = dict[str, torch.Tensor]  # input_ids and labels, (B, T)


@dataclasses.dataclass
class GeneratedBatches:
    """Find-block: fresh contexts for every step, a function of seed and step alone."""

    task: data.FindBlock
    batch_size: int
    seed: int
    rank: int
    world_size: int

    def take(self, step: int) -> Batch:
        batch = self.task.batch(self.batch_size, np.random.default_rng([self.seed, 0, step]))
        mine = slice(self.rank, None, self.world_size)
        return {"input_ids": batch.input_ids[mine], "labels": batch.labels[mine]}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


@dataclasses.dataclass
class StoredBatches(GeneratedBatches):
    """Sequences in memory, each epoch in an order of its own; the same for all arms with the same seed."""

    task: Docs

    def take(self, step: int) -> Batch:
        n = len(self.task.train_ids)
        first = step * self.batch_size
        at_B = np.arange(first + self.rank, first + self.batch_size, self.world_size)
        epochs = {e: np.random.default_rng([self.seed, 0, e]).permutation(n) for e in {int(i) // n for i in at_B}}
        rows_B = [int(epochs[int(i) // n][int(i) % n]) for i in at_B]
        return {"input_ids": self.task.train_ids[rows_B], "labels": self.task.train_labels[rows_B]}


class StreamedBatches:
    """SlimPajama: each process reads its part of the stream and can go on where it was."""

    def __init__(self, stream: data.MixedText, size: int):
        self.stream, self.size = stream, size
        self.sequences: Iterator[Batch] | None = None

    def take(self, step: int) -> Batch:
        if self.sequences is None:
            self.sequences = iter(self.stream)
        rows = [row for _, row in zip(range(self.size), self.sequences, strict=False)]
        if len(rows) < self.size:
            raise UserError(f"the data end before step {step + 1}: give more of them in `dataset`, or lower `steps`")
        return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.stream.load_state_dict(state)


def training_batches(config: Config, tokenizer, seed: int, rank: int, world_size: int):
    """This process's share of every batch: an object with `take(step)`, `state_dict` and `load_state_dict`."""
    if config.batch_size % world_size:
        raise UserError(f"batch_size={config.batch_size} is not a multiple of the {world_size} processes")
    if config.task == "findblock":
        return GeneratedBatches(find_block(config), config.batch_size, seed, rank, world_size)
    if config.task == "docs":
        return StoredBatches(load_docs(config), config.batch_size, seed, rank, world_size)
    rows = data.load_rows(config.dataset, "train", streaming=True)
    stream = data.MixedText(rows, tokenizer, config.context_length, seed=seed, rank=rank, world_size=world_size)
    return StreamedBatches(stream, config.batch_size // world_size)


def tokenizer_of(config: Config):
    if config.task == "findblock":
        return data.letter_tokenizer()
    return load_docs(config).tokenizer if config.task == "docs" else load_tokenizer(config)


# ---- model ----------------------------------------------------------------------------------------------------------
KERNEL_SETTINGS = (
    "kq_pre",
    "kq_post",
    "query_kernel_size",
    "key_kernel_size",
    "kq_layers",
    "kq_init",
    "head_pre",
    "head_post",
    "head_group_size",
    "head_norm",
)


def build_model(config: Config, tokenizer):
    """A new model, or `init_from` with what `config.model` adds to it; in float32.

    Raises:
        UserError: settings that contradict each other or the checkpoint.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from papers.mta.model import MTAConfig, MTAForCausalLM

    settings = dataclasses.asdict(config.model)
    theta = settings.pop("rope_theta")
    length = find_block(config).length if config.task == "findblock" else config.context_length
    if config.init_from is None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        try:
            return MTAForCausalLM(
                MTAConfig(
                    **settings,
                    **special,
                    vocab_size=len(tokenizer),
                    max_position_embeddings=length,
                    rope_parameters={"rope_type": "default", "rope_theta": theta},
                )
            )
        except (StrictDataclassError, ValueError) as error:
            raise UserError(f"model: {error}") from error
    loaded = AutoConfig.from_pretrained(config.init_from)
    loaded.max_position_embeddings = max(length, loaded.max_position_embeddings)
    if theta is not None:
        loaded.rope_parameters = {**loaded.rope_parameters, "rope_theta": theta}
    model = AutoModelForCausalLM.from_pretrained(config.init_from, config=loaded, dtype=torch.float32)
    kind = getattr(loaded, "attention", "transformer")
    if kind == config.model.attention:
        return model
    if config.model.attention != "mta":
        raise UserError(f"init_from: {config.init_from} has attention={kind}, not {config.model.attention}")
    try:
        return MTAForCausalLM.from_llama(model, **{name: settings[name] for name in KERNEL_SETTINGS})
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"init_from: {config.init_from}: {error}") from error
