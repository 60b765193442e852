"""What the models of this paper learn from and are asked: blocks of letters, text, needles in text.

Axes: B contexts, K blocks in a context, N letters in a block, Q queries to a context, L letters in a query, T tokens.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.experiments import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # label of a position without loss, as in torch and transformers
LETTERS = "abcdefghijklmnopqrstuvwxyz"


# ---- find-block -----------------------------------------------------------------------------------------------------
@functools.cache
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the find-block task: 4 special tokens, 26 letters, "." and "#"."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *LETTERS, ".", "#"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@dataclass(frozen=True)
class FindBlock:
    """The paper's toy task: find the one block that holds both query letters, and say what is in it.

    A sequence is `<bos>abcde.fghij. ... #xy`, the answer, and `<eos>`; with several queries, `#xy` and its answer
    repeat. The letters of a block are distinct, so are the blocks, and a query's letters stand together in no other
    block. Every block is whole: unlike in the released generator nothing is cut off, and contexts of different size
    are padded on the right. The paper has one query a context; more of them give a small model more to learn from
    each forward pass.
    """

    answer: str = "all"
    """What to answer: `all` letters of the block, its `first`, or its `last`."""
    block_size: int = 5
    """N, letters in a block; the paper has 5 and 8."""
    n_blocks: int = 50
    """K, blocks in a context."""
    min_blocks: int | None = None
    """The number of blocks is uniform from here to n_blocks; None: always n_blocks (the paper: "up to 50")."""
    query_size: int = 2
    """L, letters in a query."""
    n_queries: int = 1
    """Q, queries to a context."""

    def __post_init__(self):
        if self.answer not in ("all", "first", "last"):
            raise ValueError(f"answer={self.answer!r}: expected all, first or last")
        if not 1 <= self.query_size <= self.block_size < len(LETTERS):
            raise ValueError(
                f"query_size={self.query_size}, block_size={self.block_size}: need 1 <= query_size <= block_size < 26"
            )
        if self.n_queries < 1 or not 1 <= self.smallest <= self.n_blocks:
            raise ValueError(f"min_blocks={self.min_blocks}, n_blocks={self.n_blocks}, n_queries={self.n_queries}")

    @property
    def smallest(self) -> int:
        return self.n_blocks if self.min_blocks is None else self.min_blocks

    @property
    def answer_size(self) -> int:
        return self.block_size if self.answer == "all" else 1

    @property
    def length(self) -> int:
        """T: tokens of the longest sequence, <bos> and <eos> included."""
        return 1 + self.n_blocks * (self.block_size + 1) - 1 + self.n_queries * self._query_length + 1

    @property
    def _query_length(self) -> int:
        return 1 + self.query_size + self.answer_size

    def batch(self, size: int, rng: np.random.Generator) -> FindBlockBatch:
        """Draws `size` contexts with their queries."""
        blocks_BKN, n_blocks_B, target_BQ, query_BQL = self._draw(size, rng)
        tokens = letter_tokenizer()
        first, dot, hash_ = tokens.convert_tokens_to_ids(["a", ".", "#"])
        input_ids = np.full((size, self.length), tokens.pad_token_id)
        query_of = np.full((size, self.length), -1)
        rows = np.arange(size)
        input_ids[:, 0] = tokens.bos_token_id
        text = np.full((size, self.n_blocks, self.block_size + 1), dot)
        text[..., :-1] = first + blocks_BKN
        input_ids[:, 1 : 1 + text[0].size] = text.reshape(size, -1)

        # The queries follow the last block directly and so begin where its "." would be.
        start_B = n_blocks_B * (self.block_size + 1)
        beyond = np.arange(self.length) >= start_B[:, None]
        input_ids[beyond] = tokens.pad_token_id
        for q in range(self.n_queries):
            block_BN = blocks_BKN[rows, target_BQ[:, q]]
            answer = {"all": block_BN, "first": block_BN[:, :1], "last": block_BN[:, -1:]}[self.answer]
            piece = np.concatenate([np.full((size, 1), hash_), first + query_BQL[:, q], first + answer], axis=1)
            at = start_B[:, None] + q * self._query_length + np.arange(self._query_length)
            input_ids[rows[:, None], at] = piece
            query_of[rows[:, None], at[:, -self.answer_size :]] = q
        input_ids[rows, start_B + self.n_queries * self._query_length] = tokens.eos_token_id
        learnt = (query_of >= 0) | (input_ids == tokens.eos_token_id)
        labels = np.where(learnt, input_ids, IGNORED)
        return FindBlockBatch(*map(torch.from_numpy, (input_ids, labels, query_of)))

    def batches(self, size: int, seed: int) -> Iterator[FindBlockBatch]:
        """Endless fresh training batches."""
        rng = np.random.default_rng([seed, 0])
        while True:
            yield self.batch(size, rng)

    def test_batch(self, size: int, seed: int = 0) -> FindBlockBatch:
        """Test contexts; the stream differs from those of `batches` for every seed."""
        return self.batch(size, np.random.default_rng([seed, 1]))

    def _draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Blocks (B, K, N), numbers of blocks (B,), target blocks (B, Q), query letters (B, Q, L).

        Targets and queries come first; the other blocks are drawn again until none holds all letters of a query that is
        not theirs. This is the paper's rejection, for all contexts at once.
        """
        n_blocks_B = rng.integers(self.smallest, self.n_blocks + 1, size)
        blocks = _distinct_letters(rng, size * self.n_blocks, self.block_size).reshape(size, self.n_blocks, -1)
        target_BQ = rng.integers(n_blocks_B[:, None], size=(size, self.n_queries))
        order = rng.random((size, self.n_queries, self.block_size)).argsort(-1)[..., : self.query_size]
        target_BQK = target_BQ[..., None] == np.arange(self.n_blocks)
        for _ in range(1000):
            query_BQL = np.take_along_axis(blocks[np.arange(size)[:, None], target_BQ], order, axis=-1)
            block_BK, query_BQ = _letter_set(blocks), _letter_set(query_BQL)
            holds_BQK = (block_BK[:, None] & query_BQ[..., None]) == query_BQ[..., None]
            bad_BK = (holds_BQK & ~target_BQK).any(1) | _repeated(blocks)
            if not bad_BK.any():
                return blocks, n_blocks_B, target_BQ, query_BQL
            blocks[bad_BK] = _distinct_letters(rng, bad_BK.sum(), self.block_size)
        raise ValueError(f"{self}: too many blocks or queries for 26 letters; queries can't be made unambiguous")


def _distinct_letters(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """(n, size) letters 0..25, distinct in each row, all orders equally likely: the first steps of a shuffle."""
    letters = np.tile(np.arange(len(LETTERS)), (n, 1))
    rows = np.arange(n)
    for i in range(size):
        j = rng.integers(i, len(LETTERS), n)
        letters[rows, j], letters[:, i] = letters[:, i].copy(), letters[rows, j]
    return letters[:, :size]


def _letter_set(letters: np.ndarray) -> np.ndarray:
    """The last axis as a bit set. One letter at a time: numpy is slow at sums over short axes."""
    return sum(1 << letters[..., i] for i in range(letters.shape[-1]))


def _repeated(blocks_BKN: np.ndarray) -> np.ndarray:
    """(B, K): the block stands in its context already, further left."""
    # Codes of more than 13 letters wrap around: blocks that are alike by chance are drawn again.
    code_BK = np.zeros(blocks_BKN.shape[:2], dtype=np.int64)
    for i in range(blocks_BKN.shape[-1]):
        code_BK = code_BK * len(LETTERS) + blocks_BKN[..., i]
    order = code_BK.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(code_BK, order, axis=1)
    repeated = np.zeros(code_BK.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated


@dataclass(frozen=True)
class FindBlockBatch:
    """Tokens, labels (IGNORED but for answers and <eos>) and of each answer letter its query, else -1; all (B, T)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    query_of: torch.Tensor

    def errors(self, logits_BTV: torch.Tensor) -> torch.Tensor:
        """The paper's err_seq, (B, Q) booleans: some letter of the answer is not the teacher-forced argmax."""
        n_queries = int(self.query_of.max()) + 1
        wrong_BT = logits_BTV[:, :-1].argmax(-1).cpu() != self.input_ids[:, 1:]
        query_BT = self.query_of[:, 1:]
        return torch.stack([(wrong_BT & (query_BT == q)).any(1) for q in range(n_queries)], dim=1)


# ---- text: the documentation of Python -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Document:
    name: str
    text: str


def docs_corpus(with_source: bool = False) -> tuple[list[Document], list[Document]]:
    """Text that every Python installation holds, split into training and validation documents.

    A document is a topic of the language reference (`pydoc_data.topics`), or what one standard library module says
    about
    itself: its docstrings, or with_source=True (about 5 times the text) its whole source. A document is in the
    validation set, about one in ten, if a hash of its name says so; text of a training document that stands in a
    validation document too is dropped from the training document. Content depends on the Python version.
    """
    topics = [Document(f"topic:{name}", text) for name, text in _topics().items()]
    modules = [Document(name, source) for name, source in _standard_library()]
    paragraphs = {d.name: [d.text] if with_source else _docstrings(d.text) for d in modules}
    paragraphs.update({d.name: [d.text] for d in topics})
    held_out = {name for name in paragraphs if zlib.crc32(name.encode()) % 10 == 0}
    seen = {text for name in held_out for text in paragraphs[name]}
    train, validation = [], []
    for name in sorted(paragraphs):
        if name in held_out:
            validation.append(Document(name, "\n\n".join(paragraphs[name])))
        else:
            train.append(Document(name, "\n\n".join(text for text in paragraphs[name] if text not in seen)))
    return [d for d in train if d.text], [d for d in validation if d.text]


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python lacks pydoc_data (some systems package it apart, e.g. as python3-doc)") from error
    return topics


def _standard_library() -> Iterator[tuple[str, str]]:
    """Name and source of every module, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not left_out.intersection(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, documented) and (text := ast.get_docstring(node))]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens (at least 259), <pad>, <bos> and <eos> included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(
            f"vocab_size={vocab_size}: the bytes and special tokens alone are {len(special) + len(alphabet)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, context_length: int) -> torch.Tensor:
    """(n, context_length) tokens: documents, each between <bos> and <eos>, one after another; an unfilled rest is
    dropped.

    Attention isn't reset where a document ends, as in the paper's pre-training (and equally for all arms).
    """
    stream = np.concatenate([np.asarray(_document_tokens(text, tokenizer)) for text in texts])
    n = len(stream) // context_length
    if n == 0:
        raise UserError(
            f"{len(stream)} tokens of text don't fill one context of {context_length}: lower context_length"
        )
    return torch.from_numpy(stream[: n * context_length].reshape(n, context_length))


def _document_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]


# ---- text: SlimPajama ----------------------------------------------------------------------------------------------
def load_rows(source: str, split: str, name: str | None = None, streaming: bool = False):
    """A dataset of the hub, or of a local .jsonl, .json or .parquet file or a directory of them.

    Args:
        name: the dataset's configuration, where it has several.
        streaming: read rows as they are asked for, instead of everything first.

    Raises:
        UserError: the dataset can't be had; what to do instead.
    """
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            return load_dataset(kind, data_files={split: str(path)}, split=split, streaming=streaming)
        return load_dataset(source, name, split=split, streaming=streaming)
    except Exception as error:  # every layer below (hub, http, arrow) has its own exceptions
        raise UserError(
            f"cannot load {source} ({name or 'default'}, {split}): {error}\n"
            f"Without network: fetch it elsewhere (`hf download --repo-type dataset {source}`) and give its directory"
        ) from error


SLIMPAJAMA_MIX = {
    "RedPajamaCommonCrawl": 0.726,
    "RedPajamaC4": 0.081,
    "RedPajamaGithub": 0.049,
    "RedPajamaBook": 0.021,
    "RedPajamaArXiv": 0.023,
    "RedPajamaWikipedia": 0.05,
    "RedPajamaStackExchange": 0.05,
}
"""Share of the training tokens from each domain, by its name in the data."""


class MixedText(torch.utils.data.IterableDataset):
    """Packed training sequences {"input_ids", "labels"}, each from one domain, in given shares of the tokens.

    Continues where it was after `load_state_dict(state_dict())` (with torchdata's StatefulDataLoader or no workers).
    One pass over a stream of rows {"text", "meta": {"redpajama_set_name"}}: documents wait in a buffer per domain,
    packed one after another; each sequence comes from a domain drawn by its share. A domain that the data hold more
    of than its share fills its buffer and its surplus is skipped.

    Args:
        rows: a streaming dataset (see `load_rows`).
        context_length: tokens per sequence.
        shares: domain -> share of the tokens; rows of other domains are skipped.
        buffered: sequences that a domain's buffer holds at most (beyond one document).
        rank, world_size: under data parallelism, which part of the rows this process reads.
    """

    def __init__(
        self,
        rows,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        shares: dict[str, float] | None = None,
        seed: int = 0,
        buffered: int = 64,
        rank: int = 0,
        world_size: int = 1,
    ):
        from datasets.distributed import split_dataset_by_node

        self.rows = split_dataset_by_node(rows, rank, world_size) if world_size > 1 else rows
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.shares = dict(shares or SLIMPAJAMA_MIX)
        self.buffered = buffered
        self.rng = np.random.default_rng([seed, 2, rank])
        self.buffers: dict[str, list[int]] = {domain: [] for domain in self.shares}
        self.wanted: str | None = None  # the domain drawn for the next sequence, while its buffer fills

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self._ready()
        for row in self.rows:
            domain = _domain(row)
            if domain in self.buffers and len(self.buffers[domain]) < self.buffered * self.context_length:
                self.buffers[domain] += _document_tokens(row["text"], self.tokenizer)
                yield from self._ready()

    def _ready(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            if self.wanted is None:
                names, shares = list(self.shares), np.array(list(self.shares.values()))
                self.wanted = names[self.rng.choice(len(names), p=shares / shares.sum())]
            buffer = self.buffers[self.wanted]
            if len(buffer) < self.context_length:
                return
            input_ids = torch.tensor(buffer[: self.context_length])
            del buffer[: self.context_length]
            self.wanted = None
            yield {"input_ids": input_ids, "labels": input_ids}

    def state_dict(self) -> dict:
        """Everything that continuing at the next sequence needs."""
        return {
            "rows": self.rows.state_dict(),
            "rng": self.rng.bit_generator.state,
            "buffers": {domain: list(tokens) for domain, tokens in self.buffers.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        self.rows.load_state_dict(state["rows"])
        self.rng.bit_generator.state = state["rng"]
        self.buffers = {domain: list(tokens) for domain, tokens in state["buffers"].items()}


def _domain(row: dict) -> str:
    try:
        return row["meta"]["redpajama_set_name"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"row without meta.redpajama_set_name (its columns: {', '.join(row)}): not SlimPajama"
        ) from error


def domain_sequences(
    rows: Iterable[dict],
    tokenizer,
    context_length: int,
    per_domain: int,
    domains: Sequence[str] = tuple(SLIMPAJAMA_MIX),
) -> dict[str, torch.Tensor]:
    """The first `per_domain` packed sequences of each domain, (n, context_length); fewer where the rows end before."""
    buffers: dict[str, list[int]] = {domain: [] for domain in domains}
    enough = per_domain * context_length
    for row in rows:
        buffer = buffers.get(_domain(row))
        if buffer is not None and len(buffer) < enough:
            buffer += _document_tokens(row["text"], tokenizer)
        elif all(len(tokens) >= enough for tokens in buffers.values()):
            break
    sequences = {}
    for domain, tokens in buffers.items():
        n = min(len(tokens) // context_length, per_domain)
        if n == 0:
            raise UserError(f"the rows hold {len(tokens)} tokens of {domain}: not one context of {context_length}")
        sequences[domain] = torch.tensor(tokens[: n * context_length]).view(n, context_length)
    return sequences
