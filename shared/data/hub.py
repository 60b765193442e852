"""Public prompt sets of the post-training papers as plain rows, from the hub or from files.

    rows = load_prompts("numinamath", "train")                          # {"item", "prompt", "question", "answer", ...}
    rows = load_prompts("wildchat", "train", limit=1000, seed=0)        # {"item", "prompt", "language", "toxic", ...}
    rows = load_prompts("math500", "test", source="MATH-500/")          # a downloaded copy

Every row has `item`, an identifier that stays the same from load to load, and `prompt`, one user turn as chat messages.
Problems that can be checked also have `question` and `answer` (strings); `source`, `category` and the like are kept
where the dataset has them. `DATASETS` in `shared.data.prompt_sets` names what there is.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from shared.data.prompt_sets import DATASETS, PromptSet
from shared.experiments.errors import UserError, unknown

FILES = (".jsonl", ".json", ".parquet")


def load_prompts(
    name: str,
    split: str,
    *,
    source: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    keep: Callable[[dict], bool] | None = None,
    template: str = "{prompt}",
) -> list[dict]:
    """Rows of the prompt set `name`, in the order of the dataset; a line on stderr says how many were dropped, and why.

    Args:
        name: one of `DATASETS`.
        split: one of the set's own splits.
        source: instead of the hub: a .jsonl, .json or .parquet file, a directory with the dataset's files, or the id of
            another hub dataset with the same columns. A single file is taken whole, whatever the split's name on the
            hub.
        limit: so many random rows. Smaller subsets are part of larger ones: with the same seed, the rows of
            limit=1470 that are not among those of limit=1000 are held-out prompts.
        seed: of the random subset.
        keep: which of our rows to keep (before `limit`), such as `lambda row: row["language"] == "English"`.
        template: the user turn, with `{prompt}` where the problem or message belongs.

    Raises:
        UserError: unknown name or split, a source that cannot be read, missing columns (naming them and those that
            there are), a row that is not as expected (naming it), fewer than `limit` rows, or none at all.
    """
    if name not in DATASETS:
        raise unknown("prompt set", name, DATASETS)
    dataset = DATASETS[name]
    if split not in dataset.splits:
        raise unknown(f"split of {name}", split, dataset.splits)
    if limit is not None and limit < 1:
        raise UserError(f"{name}: limit must be at least 1, got {limit}")
    if "{prompt}" not in template:
        raise UserError(f"{name}: the template has no {{prompt}}: {template!r}")
    label = f"{name} ({split})"
    table = _columns(_read(name, dataset, split, source), dataset, label)

    dropped: Counter[str] = Counter()
    shuffled = random.Random(f"{name}/{seed}").sample
    if limit is None or dataset.held_out:
        found = list(_converted(name, dataset, label, enumerate(table), template, dropped))
        if dataset.held_out:
            found = _part(found, split, dataset.held_out)
        found = list(_kept(found, keep, dropped))
        if limit is not None:
            found = shuffled(found, len(found))[:limit]
    else:  # only as many rows are read as it takes: some of these datasets have a million
        order = ((i, table[i]) for i in shuffled(range(len(table)), len(table)))
        found = _kept(_converted(name, dataset, label, order, template, dropped), keep, dropped)
        found = [row for _, row in zip(range(limit), found, strict=False)]
    _report(label, len(table), len(found), dropped, limit)
    return [each.row for each in sorted(found, key=lambda each: each.index)]


def _read(name: str, dataset: PromptSet, split: str, source: str | Path | None):
    """The `datasets.Dataset` of `split`."""
    hub, split = dataset.hub, dataset.splits[split]
    path = None if source is None else Path(source)
    if path is not None and not path.exists():
        if path.suffix in FILES or path.is_absolute() or str(source).startswith((".", "~")):
            raise UserError(f"{name}: no such file or directory: {path}; {_remedy(dataset)}")
        hub, path = str(source), None
    if path is not None and path.is_dir() and dataset.file and (path / dataset.file).exists():
        path /= dataset.file
    if path is not None and path.is_file() and path.suffix not in FILES:
        raise UserError(f"{name}: cannot read {path}: the name of a data file ends with {', '.join(FILES)}")
    if path is None and hub is None:
        raise UserError(f"{name} is not on the hub: give it as source; {_remedy(dataset)}")

    from datasets import Dataset, load_dataset

    try:
        if path is not None and path.is_file():
            # Not load_dataset("json", ...), which calls the hub even for local files, to count loads.
            return Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_json(str(path))
        if path is not None:
            described = (path / "README.md").exists()  # as on the hub: the names of its parts are there
            return load_dataset(str(path), dataset.config if described else None, split=split)
        if dataset.file:
            # By its address: as a repository, those with loading scripts are refused.
            address = f"hf://datasets/{hub}/{dataset.file}"
            return load_dataset("json", data_files=address, split="train")
        return load_dataset(hub, dataset.config, split=split)
    except Exception as error:  # every layer below (hub, http, arrow) has its own exceptions
        why = f"{error}: {error.__cause__}" if error.__cause__ else error
        raise UserError(f"cannot load {name} ({split}) from {path or hub}: {why}\n{_remedy(dataset)}") from error


def _remedy(dataset: PromptSet) -> str:
    if dataset.hub is None:
        return dataset.where
    return (
        f"without network, fetch it elsewhere with `hf download --repo-type dataset {dataset.hub} --local-dir DIR` and "
        "give DIR as source"
    )


def _columns(table, dataset: PromptSet, label: str):
    """`table` with the needed columns only."""
    if missing := [column for column in dataset.columns if column not in table.column_names]:
        raise UserError(
            f"{label}: no column {', '.join(map(repr, missing))}; the source has "
            f"{', '.join(map(repr, table.column_names)) or 'none'}"
        )
    return table.select_columns([c for c in (*dataset.columns, *dataset.optional) if c in table.column_names])


class _Found(NamedTuple):
    index: int  # in the dataset
    text: str
    row: dict


def _converted(
    name: str,
    dataset: PromptSet,
    label: str,
    numbered: Iterable[tuple[int, dict]],
    template: str,
    dropped: Counter[str],
) -> Iterator[_Found]:
    """Our rows; counts those that become none in `dropped`."""
    texts: set[str] = set()
    items: dict[str, int] = {}
    for i, raw in numbered:
        try:
            row = dataset.convert(raw)
        except ValueError as error:
            raise UserError(f"{label}: row {i}: {error}") from error
        if isinstance(row, str):
            dropped[row] += 1
            continue
        item, text = row.pop("item", None), row.pop("text")
        item = f"{name}/{i}" if item is None else str(item)
        if dataset.unique:
            if (same := " ".join(text.split())) in texts:
                dropped["duplicate"] += 1
                continue
            texts.add(same)
        if item in items:
            raise UserError(f"{label}: rows {items[item]} and {i} have the same identifier {item!r}")
        items[item] = i
        prompt = [{"role": "user", "content": template.replace("{prompt}", text)}]
        yield _Found(i, text, {"item": item, "prompt": prompt, **row})


def _kept(found: Iterable[_Found], keep: Callable[[dict], bool] | None, dropped: Counter[str]) -> Iterator[_Found]:
    for each in found:
        if keep is None or keep(each.row):
            yield each
        else:
            dropped["not asked for"] += 1


def _part(found: list[_Found], split: str, held_out: int) -> list[_Found]:
    """Those of `split`. What is held out depends on the texts alone, neither on their order nor on a seed."""
    n = min(held_out, max(1, len(found) // 10))
    ranked = sorted(found, key=lambda each: hashlib.blake2b(each.text.encode()).digest())
    part = {"test": ranked[:n], "validation": ranked[n : 2 * n], "train": ranked[2 * n :]}[split]
    return sorted(part, key=lambda each: each.index)


def _report(label: str, total: int, usable: int, dropped: Counter[str], limit: int | None) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common()) or "none"
    print(f"{label}: {usable:,} rows; the source has {total:,}; dropped: {reasons}", file=sys.stderr)
    if not usable or (limit is not None and usable < limit):
        asked = "some" if limit is None else f"{limit:,}"
        raise UserError(f"{label}: wanted {asked} rows; the source has {usable:,} that can be used")
