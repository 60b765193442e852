"""Splits that cannot overlap: the problem itself decides which split it belongs to."""

from __future__ import annotations

import hashlib
import random

from shared.experiments.errors import unknown

SPLITS = ("train", "dev", "test")


def split_of(key: str) -> str:
    """The split of the problem whose canonical form is `key`: 80 % of all problems are train, 10 % dev, 10 % test."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return {0: "dev", 1: "test"}.get(int.from_bytes(digest, "big") % 10, "train")


def split_stream(name: str, split: str, seed: int) -> random.Random:
    """The random stream of one generator's split; raises UserError for an unknown split."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return random.Random(f"{name}/{split}/{seed}")
