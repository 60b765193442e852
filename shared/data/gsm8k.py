"""GSM8K, from the hub or from files, and GSM8K-Aug, its version with equations only.

GSM8K rows hold a worked solution with calculator annotations and a last line with the answer,

    Natalia sold 48/2 = <<48/2=24>>24 clips in May. ... #### 72

GSM8K-Aug (Deng et al., github.com/da03/Internalize_CoT_Step_by_Step) has one line per problem,

    question||<<48/2=24>> <<48+24=72>> #### 72

Both become rows of `question`, `steps` (the equations, `<<48/2=24>>`) and `answer` (without thousands separators);
GSM8K rows also have `solution`, the text without annotations and answer line. Some problems of both are solved
without an equation: their `steps` are empty.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from shared.experiments.errors import UserError

ANNOTATION = re.compile(r"<<[^<>]*>>")


def load_gsm8k(source: str = "openai/gsm8k", split: str = "train") -> list[dict]:
    """Rows of GSM8K.

    Args:
        source: a .jsonl file, a directory with `{split}.jsonl`, or the id of a hub dataset.
        split: train or test; not used if `source` is a file.

    Raises:
        UserError: no such file, a row that is not in the format above (naming file, row and key), or a hub that
            cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if path.suffix == ".jsonl":
        lines = _lines(path)
        return [_gsm8k_row(_parse_json(line, path, i), f"{path}: row {i}") for i, line in enumerate(lines)]
    return [_gsm8k_row(row, f"{source} ({split}): row {i}") for i, row in enumerate(_from_hub(source, split))]


def load_icot(path: str | Path) -> list[dict]:
    """Rows of a GSM8K-Aug text file; raises UserError naming file and row where it is not in the format above."""
    return [_icot_row(line, f"{path}: row {i}") for i, line in enumerate(_lines(Path(path)))]


def _lines(path: Path) -> list[str]:
    try:
        # Only "\n" ends a row: some questions hold other characters that str.splitlines would split at.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{path}: no such file; GSM8K is openai/gsm8k on the hub, GSM8K-Aug is in the folder data/gsm8k of "
            "github.com/da03/Internalize_CoT_Step_by_Step"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); is it compressed?") from error
    return lines[:-1] if lines[-1] == "" else lines


def _parse_json(line: str, path: Path, index: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: row {index} is not JSON ({error}); a .jsonl file has one object per line") from error


def _from_hub(source: str, split: str) -> list[dict]:
    from datasets import load_dataset

    try:
        return list(load_dataset(source, "main", split=split))
    except Exception as error:  # every layer below (hub, http, arrow) has its own exceptions
        raise UserError(
            f"cannot load {source} ({split}) from the hub: {error}\n"
            f"Without network: fetch it elsewhere with `hf download --repo-type dataset {source}`, or give the path of "
            f"a {split}.jsonl with question and answer per line"
        ) from error


def _gsm8k_row(row: object, where: str) -> dict:
    for key in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: needs a non-empty string {key!r}; expected GSM8K's question and answer")
    solution, answer = _split_answer(row["answer"], where)
    return {
        "question": row["question"].strip(),
        "steps": ANNOTATION.findall(solution),
        "solution": ANNOTATION.sub("", solution).strip(),
        "answer": answer,
    }


def _icot_row(line: str, where: str) -> dict:
    question, bar, rest = line.partition("||")
    if not bar or not question.strip():
        raise UserError(f"{where}: no `question||`; expected `question||<<step>> <<step>> #### answer`")
    solution, answer = _split_answer(rest, where)
    steps = ANNOTATION.findall(solution)
    if leftover := ANNOTATION.sub("", solution).strip():
        raise UserError(f"{where}: {leftover[:40]!r} stands between the steps; expected only `<<...>> <<...>>`")
    return {"question": question.strip(), "steps": steps, "answer": answer}


def _split_answer(text: str, where: str) -> tuple[str, str]:
    solution, mark, answer = text.rpartition("####")
    answer = answer.replace(",", "").strip()
    if not mark or not answer:
        raise UserError(f"{where}: no answer after `####`")
    return solution, answer
