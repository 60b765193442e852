"""Rows of question, steps and answer: the format of the authors' files, word lists, and tokenizers for generated data.

    {"question": "Every blix is a dwung. ... Is Ada a dwung or frerp?",
     "steps": ["Ada is a blix.", "Every blix is a dwung."],
     "answer": "Ada is a dwung."}

Rows about a graph (ProsQA) carry it along: `idx_to_symbol` (name of each node), `edges` (pairs of nodes, source first),
and the nodes `root` (asked about), `target` (right option) and `neg_target` (wrong option).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING

from shared.experiments.errors import UserError
from shared.experiments.files import write_text

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

GRAPH_KEYS = ("idx_to_symbol", "edges", "root", "target", "neg_target")
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bot>", "<eot>", "<latent>", "<pause>")

# fmt: off
PEOPLE = (
    "Ada", "Boris", "Chloe", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Ines", "Jonas",
    "Katya", "Leon", "Mira", "Nils", "Petra", "Quinn", "Rosa", "Stefan", "Tilda", "Viktor",
)
PROPERTIES = (
    "bright", "cold", "dense", "dull", "fast", "heavy", "hollow", "loud",
    "mild", "opaque", "round", "shy", "smooth", "sour", "sweet", "tall",
)
ONSETS = ("bl", "dw", "fr", "gl", "kr", "pl", "sn", "tr")
RHYMES = ("adz", "erp", "ix", "olm", "ung")
# fmt: on
CONCEPTS = tuple(onset + rhyme for onset, rhyme in product(ONSETS, RHYMES))  # 40 invented words
# Every word of the text tasks, so that a tokenizer does not depend on which of them a data set happens to use.
FRAME = ("Every", "is", "a", ".", "Is", "or", "?", "not", "True", "False", "false", ":")
VOCABULARY = (*PEOPLE, *CONCEPTS, *PROPERTIES, *FRAME)


def load_json(path: str | Path) -> list[dict]:
    """The rows of a JSON file in the authors' format.

    Raises:
        UserError: the file cannot be read or a row is malformed; names file, row, key and what to do.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a JSON list of rows with question, steps and answer") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); was it cut short? Fetch or write it again") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a non-empty JSON list of rows, found {_kind(rows)}")
    for i, row in enumerate(rows):
        check_row(row, f"{path}: row {i}")
    return rows


def save_json(path: str | Path, rows: list[dict]) -> None:
    """Writes `rows` as `load_json` reads them; atomic."""
    write_text(Path(path), json.dumps(rows) + "\n")


def check_row(row: object, where: str) -> None:
    """Raises UserError, beginning with `where`, unless `row` is as the head of this module says."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with question, steps and answer, found {_kind(row)}")
    for key in ("question", "steps", "answer"):
        if key not in row:
            raise UserError(
                f"{where}: no key {key!r}; it has {', '.join(map(repr, row)) or 'none'}. Add it or rename one"
            )
    for key in ("question", "answer"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{where}: key {key!r} must be a non-empty string, found {_kind(row[key])}")
    if not isinstance(row["steps"], list) or not row["steps"]:
        raise UserError(
            f"{where}: key 'steps' must be a non-empty list of strings, found {_kind(row['steps'])}; "
            "write out the reasoning or remove the row"
        )
    for j, step in enumerate(row["steps"]):
        if not isinstance(step, str) or not step.strip():
            raise UserError(f"{where}: steps[{j}] must be a non-empty string, found {_kind(step)}")
    if any(key in row for key in GRAPH_KEYS):
        _check_graph(row, where)


def _check_graph(row: dict, where: str) -> None:
    if missing := [key for key in GRAPH_KEYS if key not in row]:
        raise UserError(f"{where}: no key {missing[0]!r}; a row with a graph has all of {', '.join(GRAPH_KEYS)}")
    symbols = row["idx_to_symbol"]
    if not isinstance(symbols, list) or not all(isinstance(s, str) and s for s in symbols):
        raise UserError(f"{where}: key 'idx_to_symbol' must be a list of names, found {_kind(symbols)}")
    if not isinstance(row["edges"], list):
        raise UserError(f"{where}: key 'edges' must be a list of [source, destination], found {_kind(row['edges'])}")
    for j, edge in enumerate(row["edges"]):
        if not isinstance(edge, list) or len(edge) != 2 or not all(_is_node(v, symbols) for v in edge):
            raise UserError(f"{where}: edges[{j}] must be two nodes 0..{len(symbols) - 1}, found {edge!r:.60}")
    for key in ("root", "target", "neg_target"):
        if not _is_node(row[key], symbols):
            raise UserError(f"{where}: key {key!r} must be a node 0..{len(symbols) - 1}, found {row[key]!r:.60}")


def _is_node(value: object, symbols: list[str]) -> bool:
    return type(value) is int and 0 <= value < len(symbols)


def _kind(value: object) -> str:
    empty = isinstance(value, str | list | dict) and not value
    return f"{'an empty ' if empty else ''}{type(value).__name__}"


# ---- tokenizers ---------------------------------------------------------------------------------------------------

# Split off inside a word: brackets of equations, operators, and punctuation at its end (so 0.5 stays whole).
_MARKS = r"<<|>>|[-+*/=]|[.,:?!]$"
_NO_SPACE_BEFORE = r" (?=[.,:?!]|>>)|(?<=\d) (?=[-+*/=])"
_NO_SPACE_AFTER = r"(?<=[-+*/=]|<<) "


def word_tokenizer(rows: Iterable[dict], extra: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, number, operator and punctuation mark of `rows` and of the texts `extra`.

    All white space is the same to it: line breaks are decoded as spaces. A word that it does not know is an error,
    not an <unk>.
    """
    from tokenizers import Regex, decoders, pre_tokenizers

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_MARKS), behavior="isolated")]
    )
    texts = chain.from_iterable((row["question"], *row["steps"], row["answer"]) for row in rows)
    words = {word for text in chain(texts, extra) for word, _ in split.pre_tokenize_str(text)}
    # The WordPiece decoder puts a space before each token; the replacements take the superfluous ones away.
    decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\n", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(_NO_SPACE_BEFORE), ""),
            decoders.Replace(Regex(_NO_SPACE_AFTER), ""),
        ]
    )
    return _word_level(words, split, decoder)


def facts_tokenizer(n_names: int = 13) -> PreTrainedTokenizerFast:
    """The tokenizer of balanced ProsQA as facts: nodes `n0`.., one token per possible edge `n3>n7`, and `?`."""
    from tokenizers import decoders, pre_tokenizers

    names = [f"n{i}" for i in range(n_names)]
    facts = [f"{a}>{b}" for a in names for b in names if a != b]
    decoder = decoders.WordPiece(prefix="\n", cleanup=False)
    return _word_level([*names, *facts, "?"], pre_tokenizers.WhitespaceSplit(), decoder)


def fact_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """`[V, 2]` token ids of the source and destination node of each fact token; -1 for all other tokens."""
    import numpy as np

    table_V2 = np.full((len(tokenizer), 2), -1, dtype=np.int64)
    vocab = tokenizer.get_vocab()
    for token, i in vocab.items():
        source, arrow, destination = token.partition(">")
        if arrow and source in vocab and destination in vocab:
            table_V2[i] = vocab[source], vocab[destination]
    return table_V2


def _word_level(words: Iterable[str], pre_tokenizer, decoder) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ordinary = sorted({*words, "###"} - set(SPECIAL_TOKENS))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL_TOKENS, *ordinary))}))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    pad, eos, *others = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, extra_special_tokens=others
    )
