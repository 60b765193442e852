"""The public prompt sets that `shared.data.hub` loads: where each is, its columns and splits, how its rows become ours.

The names of columns and splits were compared with the datasets' cards and with public code that reads them. What is
not as expected is an error when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptSet:
    """A dataset, and how its rows become ours.

    hub: its id on the hub; None if it is not there (then `where` says where it is).
    splits: names of splits here -> split of the hub that holds them.
    columns: what `convert` needs; their absence is an error.
    convert: the dataset's row -> the columns of ours (`text` becomes `prompt`), or, as a string, why it is dropped.
        Raises ValueError for a row that it cannot understand.
    optional: columns that `convert` uses where they exist.
    config: the hub's name of the part to load.
    file: the one file to load, where the repository has others that are not data or of another kind.
    unique: drop all but one of several rows with the same text, whatever its white space.
    held_out: `test` and `validation` are this many rows of the hub's only split each, `train` is the rest.
    """

    hub: str | None
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    convert: Callable[[dict], dict | str]
    optional: tuple[str, ...] = ()
    config: str | None = None
    file: str | None = None
    unique: bool = False
    held_out: int = 0
    where: str = ""


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` whose braces close; None if there is none."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth, i = 1, match.end()
        while i < len(text) and depth:
            if text[i] == "\\":  # \{ and \} are characters of the answer
                i += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        if not depth:
            return text[match.end() : i - 1].strip()
    return None


def _text(row: dict, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} must be a non-empty string, not {value!r}")
    return value.strip()


def _answer(value: object) -> str:
    """A final answer as text: strings as they are, 27.0 as 27, several answers separated by commas; "" for none."""
    if isinstance(value, bool):
        raise ValueError(f"an answer must be a string or a number, not {value!r}")
    if isinstance(value, (list, tuple)):
        return ", ".join(_answer(each) for each in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return str(value).strip()
    if value is None:
        return ""
    raise ValueError(f"an answer must be a string or a number, not {value!r}")


def _problem(
    question: str = "problem", answer: str = "answer", item: str = "", extra: tuple[str, ...] = ()
) -> Callable[[dict], dict]:
    """The conversion of a benchmark: every row must have its answer."""

    def convert(row: dict) -> dict:
        text, gold = _text(row, question), _answer(row[answer])
        if not gold:
            raise ValueError(f"{answer!r} is empty")
        kept = {column: row[column] for column in extra if column in row}
        return {"item": row.get(item), "text": text, "question": text, "answer": gold, **kept}

    return convert


def _message(column: str, item: str = "", extra: tuple[str, ...] = ()) -> Callable[[dict], dict]:
    """The conversion of prompts without a checkable answer."""

    def convert(row: dict) -> dict:
        kept = {name: row[name] for name in extra if name in row}
        return {"item": row.get(item), "text": _text(row, column), **kept}

    return convert


SYNTHETIC = {"orca_math", "synthetic_amc", "synthetic_math"}
PROOF = re.compile(r"\b(prove|disprove|proof|(show|demonstrate|verify) that)\b", re.IGNORECASE)
# (A) ... (B) ... (C); or A: ... B: ... C: ... D: ..., also A) and, where a line begins, A. (elsewhere that may end a
# sentence about a point).
OPTIONS = re.compile(
    r"\(A\).*?\(B\).*?\(C\)|" + ".*?".join(rf"(?:^[ \t]*{x}[.:)]|\s{x}[:)])\s*\S" for x in "ABCD"),
    re.DOTALL | re.MULTILINE,
)
LETTER = re.compile(r"\(?(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?[A-E]\)?\s*\}?\)?[.:]?")


def _numinamath(row: dict) -> dict | str:
    if row["source"] in SYNTHETIC:
        return "synthetic"
    question, solution = row["problem"], row["solution"]
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ValueError(f"'problem' and 'solution' must be strings, not {question!r} and {solution!r}")
    question, answer = question.strip(), boxed(solution)
    if not question:
        return "empty"
    if PROOF.search(question):
        return "proof"
    if OPTIONS.search(question) or (answer and LETTER.fullmatch(answer)):
        return "multiple choice"
    if not answer:
        return "no answer"
    return {"text": question, "question": question, "answer": answer, "source": row["source"]}


# A figure that the text speaks of and does not contain. [asy] code is a figure in text.
FIGURE = re.compile(
    r"!\[|\\includegraphics|<ima?ge?\b|\bas shown\b|\bshown (above|below|here|at (the )?(right|left))\b"
    r"|\b(figure|diagram|picture|drawing|graph|image) (above|below|at (the )?(right|left)|(is )?shown)\b"
    r"|\b(in|see|from|of|to|on) (the|this) (\w+ )?(figure|diagram|picture|drawing|image)\b|\bfig(ure|\.) ?\d",
    re.IGNORECASE,
)


def _deepscaler(row: dict) -> dict | str:
    question, answer = _text(row, "problem"), _answer(row["answer"])
    if not answer:
        return "no answer"
    if FIGURE.search(question) and "[asy]" not in question:
        return "needs a figure"
    return {"text": question, "question": question, "answer": answer}


def _wildchat(row: dict) -> dict | str:
    turns = row["conversation"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"'conversation' must be a list of turns, not {turns!r}")
    if not turns or turns[0].get("role") != "user":
        return "no user turn first"
    if not isinstance(turns[0].get("content"), str) or not turns[0]["content"].strip():
        return "empty"
    # The conversation's own columns are about all of its turns, of which only the first is used.
    first = {key: turns[0].get(key, row.get(key)) for key in ("language", "toxic", "redacted")}
    return {"item": row.get("conversation_hash"), "text": turns[0]["content"].strip(), **first}


def _arena_hard(row: dict) -> dict:
    extra = {key: row[key] for key in ("category", "subcategory", "cluster") if row.get(key) is not None}
    return {"item": row.get("uid") or row.get("question_id"), "text": _text(row, "prompt"), **extra}


def _similarity(row: dict) -> dict:
    if row["similar"] not in (0, 1):  # False and True as well
        raise ValueError(f"'similar' must be 0 or 1, not {row['similar']!r}")
    responses = [_text(row, "generation_0"), _text(row, "generation_1")]
    return {"text": _text(row, "prompt"), "responses": responses, "similar": bool(row["similar"])}


def _gsm8k(row: dict) -> dict:
    question, solution = _text(row, "question"), _text(row, "answer")
    answer = solution.rpartition("####")[2].replace(",", "").strip()
    if "####" not in solution or not answer:
        raise ValueError("no answer after `####`")
    return {"text": question, "question": question, "answer": answer}


def _own(row: dict) -> dict:
    text = _text(row, "prompt")
    kept = {key: value for key, value in row.items() if key != "prompt" and value is not None}
    if "answer" in kept:
        kept |= {"question": text, "answer": _answer(kept["answer"])}
    return {**kept, "text": text}


MATH_ARENA = {
    "splits": {"test": "train"},  # the hub calls them so
    "columns": ("problem", "answer"),
    "convert": _problem(),
}

DATASETS: dict[str, PromptSet] = {
    # Bridging Offline and Online RL: without proofs, multiple choice and synthetic problems. The paper has 261,440 left
    # and holds out 1,980 twice; its rules for the first two are not published, those here are ours. Of sources with
    # fewer than 19,800 problems, a tenth is held out twice.
    "numinamath": PromptSet(
        hub="AI-MO/NuminaMath-CoT",
        splits={"train": "train", "validation": "train", "test": "train"},
        columns=("source", "problem", "solution"),
        convert=_numinamath,
        unique=True,
        held_out=1980,
    ),
    # DARLING: without problems that need a figure (the rule is ours), 10,000 at random (limit=10_000).
    "deepscaler": PromptSet(
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        splits={"train": "train"},
        columns=("problem", "answer"),
        convert=_deepscaler,
        unique=True,
    ),
    "gsm8k": PromptSet(
        hub="openai/gsm8k",
        config="main",
        splits={"train": "train", "test": "test"},
        columns=("question", "answer"),
        convert=_gsm8k,
    ),
    "math500": PromptSet(
        hub="HuggingFaceH4/MATH-500",
        splits={"test": "test"},
        columns=("problem", "answer"),
        optional=("unique_id", "subject", "level"),
        convert=_problem(item="unique_id", extra=("subject", "level")),
    ),
    "amc23": PromptSet(
        hub="zwhe99/amc23",
        splits={"test": "test"},
        columns=("question", "answer"),
        convert=_problem("question"),
    ),
    "aime25": PromptSet(hub="MathArena/aime_2025", **MATH_ARENA),
    "hmmt25": PromptSet(hub="MathArena/hmmt_feb_2025", **MATH_ARENA),
    "brumo25": PromptSet(hub="MathArena/brumo_2025", **MATH_ARENA),
    # The 675 problems that evaluations in text use.
    "olympiadbench": PromptSet(
        hub="zwhe99/simplerl-OlympiadBench",
        splits={"test": "test"},
        columns=("question", "final_answer"),
        convert=_problem("question", "final_answer"),
    ),
    # First user turns. language, toxic and redacted are those of the turn.
    "wildchat": PromptSet(
        hub="allenai/WildChat-1M",
        splits={"train": "train"},
        columns=("conversation",),
        optional=("conversation_hash", "language", "toxic", "redacted"),
        convert=_wildchat,
        unique=True,
    ),
    "noveltybench": PromptSet(
        hub="yimingzhang/novelty-bench",
        splits={"curated": "curated", "wildchat": "wildchat"},
        columns=("prompt",),
        optional=("id", "category"),
        convert=_message("prompt", item="id", extra=("category",)),
    ),
    "alpacaeval": PromptSet(
        hub="tatsu-lab/alpaca_eval",
        file="alpaca_eval.json",
        splits={"test": "eval"},
        columns=("instruction",),
        optional=("dataset",),
        convert=_message("instruction", extra=("dataset",)),
    ),
    "arenahard_v0.1": PromptSet(
        hub="lmarena-ai/arena-hard-auto",
        file="data/arena-hard-v0.1/question.jsonl",
        splits={"test": "train"},
        columns=("prompt",),
        optional=("uid", "question_id", "category", "cluster"),
        convert=_arena_hard,
    ),
    # category: hard_prompt (500) or creative_writing (250).
    "arenahard_v2.0": PromptSet(
        hub="lmarena-ai/arena-hard-auto",
        file="data/arena-hard-v2.0/question.jsonl",
        splits={"test": "train"},
        columns=("prompt",),
        optional=("uid", "category", "subcategory"),
        convert=_arena_hard,
    ),
    # A file of one's own.
    "prompts": PromptSet(
        hub=None,
        where="a file or directory with a column prompt (text), and answer, item, source, category if there are any",
        splits={"train": "train", "validation": "validation", "test": "test"},
        columns=("prompt",),
        optional=("answer", "item", "source", "category"),
        convert=_own,
    ),
    # DARLING's human labels of pairs of NoveltyBench responses: 1,000 for training, 100 held out.
    "similarity": PromptSet(
        hub=None,
        where="data/classifier/train.jsonl and val.jsonl in the folder evals/novelty-bench of "
        "github.com/facebookresearch/darling (columns prompt, generation_0, generation_1, similar)",
        splits={"train": "train", "validation": "validation"},
        columns=("prompt", "generation_0", "generation_1", "similar"),
        convert=_similarity,
    ),
}
