"""Keyword writing with a hidden scorer: a task whose reward has to be learned from comparisons.

    prompt      river lantern :
    response    a few words, better ones and the two keywords among them

Nobody who trains on this task may call `gold_score`: it plays the human being. It labels comparisons, from which a
reward model is learned (`prefer`), and it judges the results.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from shared.data.splits import split_of, split_stream
from shared.rewards.contract import Completions, column, texts

# fmt: off
WORDS = (
    "amber", "birch", "cloud", "dune", "ember", "fern", "grove", "harbor",
    "island", "jasmine", "kettle", "lantern", "meadow", "north", "orchard", "pebble",
    "quill", "river", "stone", "thistle", "umber", "valley", "willow", "yarrow",
)
# fmt: on
COLON = ":"
VOCABULARY = (*WORDS, COLON)  # every word of prompts and responses
MAX_WORDS = 16  # of a response

# What the hidden reader likes: a value in (-1, 1) for each word.
_values = random.Random("writing/values")
VALUES = {word: _values.uniform(-1, 1) for word in WORDS}
UNKNOWN_VALUE = -1.0

LENGTH_BIAS = 0.02  # annotators like length a little, per word


def writing_rows(n: int, split: str, seed: int = 0) -> list[dict]:
    """`n` rows of prompt and keywords (two different words); the same arguments always give the same rows.

    The pair of keywords, in either order, decides the split, so splits cannot overlap. There are 552 prompts in all;
    no prompt comes twice before every prompt of the split has come once.
    """
    rng = split_stream("writing", split, seed)
    every = [
        {"prompt": f"{a} {b} {COLON}", "keywords": [a, b]}
        for a in WORDS
        for b in WORDS
        if a != b and split_of("writing " + " ".join(sorted((a, b)))) == split
    ]
    rows: list[dict] = []
    while len(rows) < n:
        rng.shuffle(every)
        rows += every[: n - len(rows)]
    return rows


def gold_score(keywords: Sequence[str], text: str) -> float:
    """How much the hidden reader likes a response.

    1.5 x mean value of its different words + share of the keywords that occur - 3 x share of words that repeat an
    earlier one - 0.5 for each word short of three - 0.15 for each beyond eight. Words that are not in WORDS count as
    the worst; an empty response has the worst value too.
    """
    words = text.split()
    different = set(words)
    value = sum(VALUES.get(word, UNKNOWN_VALUE) for word in different) / len(different) if words else UNKNOWN_VALUE
    covered = sum(word in different for word in keywords) / len(keywords)
    repeated = 1 - len(different) / len(words) if words else 0.0
    return 1.5 * value + covered - 3 * repeated - 0.5 * max(0, 3 - len(words)) - 0.15 * max(0, len(words) - 8)


def prefer(keywords: Sequence[str], a: str, b: str) -> tuple[str, str]:
    """(chosen, rejected) as an annotator orders two responses: by the gold score and a little by length; ties keep the
    order."""
    of_a, of_b = (gold_score(keywords, text) + LENGTH_BIAS * len(text.split()) for text in (a, b))
    return (a, b) if of_a >= of_b else (b, a)


def weak_responses(rows: Iterable[Mapping], seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, response) of a weak writer: a random walk over the words with likely successors of its own, that now and
    then takes up a keyword and repeats itself. What a starting policy learns from."""
    rng = random.Random(f"writing/weak/{seed}")
    table = random.Random("writing/successors")
    successors = {word: table.sample(WORDS, 4) for word in WORDS}
    found = []
    for row in rows:
        words = [rng.choice(WORDS)]
        while len(words) < 12 and (len(words) < 2 or rng.random() > 0.15):
            kind = rng.random()
            if kind < 0.15:
                words.append(rng.choice(row["keywords"]))
            elif kind < 0.3:
                words.append(rng.choice(WORDS))
            else:
                words.append(rng.choice(successors[words[-1]]))
        found.append((row["prompt"], " ".join(words)))
    return found


def scribbles(rows: Iterable[Mapping], seed: int = 0) -> list[str]:
    """A response of random words for each row, often with a keyword or a repetition, of 1 to 16 words: what a reward
    model needs to have seen beside the policy's own samples."""
    rng = random.Random(f"writing/scribbles/{seed}")
    found = []
    for row in rows:
        words = rng.choices(WORDS, k=rng.randint(1, MAX_WORDS))
        for keyword in row["keywords"]:
            if rng.random() < 0.5:
                words[rng.randrange(len(words))] = keyword
        if rng.random() < 0.4:
            words = [word if rng.random() < 0.6 else words[0] for word in words]
        found.append(" ".join(words))
    return found


def gold_reward(prompts: Sequence[str], completions: Completions, **columns) -> list[float]:
    """The gold score with a reward's signature; for evaluation."""
    keywords = column("keywords", columns, len(completions), "gold")
    return [gold_score(k, text) for k, text in zip(keywords, texts(completions), strict=True)]
