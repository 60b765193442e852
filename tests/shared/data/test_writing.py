import numpy as np
import pytest

from shared.data.splits import SPLITS
from shared.data.writing import (
    COLON,
    LENGTH_BIAS,
    MAX_WORDS,
    VALUES,
    VOCABULARY,
    WORDS,
    gold_reward,
    gold_score,
    prefer,
    scribbles,
    weak_responses,
    writing_rows,
)
from shared.experiments.errors import UserError

BEST, SECOND, THIRD = sorted(VALUES, key=VALUES.get, reverse=True)[:3]
WORST = min(VALUES, key=VALUES.get)


def test_splits_share_no_pair_of_keywords_and_hold_all_of_them():
    rows = {split: writing_rows(1000, split) for split in SPLITS}
    pairs = {split: {frozenset(row["keywords"]) for row in found} for split, found in rows.items()}
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values())) == len(WORDS) * (len(WORDS) - 1) // 2
    assert {row["prompt"] for found in rows.values() for row in found} == {
        f"{a} {b} :" for a in WORDS for b in WORDS if a != b
    }


def test_every_prompt_comes_once_before_one_comes_twice():
    prompts = [row["prompt"] for row in writing_rows(1000, "test", seed=4)]
    number = len(set(prompts))
    assert len(set(prompts[:number])) == len(set(prompts[number : 2 * number])) == number
    assert prompts == [row["prompt"] for row in writing_rows(1000, "test", seed=4)]
    assert prompts != [row["prompt"] for row in writing_rows(1000, "test", seed=5)]


def test_values_differ_between_words():
    assert len(set(VALUES.values())) == len(WORDS)
    assert -1 < VALUES[WORST] < -0.5 < 0.5 < VALUES[BEST] < 1


def test_score_by_hand():
    a, b, c = BEST, SECOND, THIRD
    value = VALUES[a] + VALUES[b] + VALUES[c]
    assert gold_score([a, WORST], f"{a} {b} {c}") == pytest.approx(1.5 * value / 3 + 0.5)
    # one of four words repeats an earlier one
    assert gold_score([a, b], f"{a} {b} {a} {c}") == pytest.approx(1.5 * value / 3 + 1 - 3 / 4)
    assert gold_score([b, c], a) == pytest.approx(1.5 * VALUES[a] - 0.5 * 2)
    assert gold_score([a, b], "") == pytest.approx(-1.5 - 1.5)
    ten = " ".join(WORDS[:10])
    expected = 1.5 * np.mean([VALUES[word] for word in WORDS[:10]]) + 1 - 0.15 * 2
    assert gold_score([WORDS[0], WORDS[9]], ten) == pytest.approx(expected)


def test_foreign_words_are_worth_as_little_as_the_worst():
    assert gold_score([BEST, SECOND], "7 8 9") == pytest.approx(-1.5)
    assert gold_score([BEST, SECOND], "7 8 9") < gold_score([BEST, SECOND], f"{WORST} 8 9")


def test_annotators_follow_the_score_and_then_length():
    good, bad = f"{BEST} {SECOND} {THIRD}", f"{WORST} {WORST} {WORST}"
    assert prefer([BEST, SECOND], good, bad) == prefer([BEST, SECOND], bad, good) == (good, bad)
    assert 0 < LENGTH_BIAS < 0.15  # below what words beyond eight cost, or the longest would be the best
    rows = writing_rows(300, "train")
    for row, a, b in zip(rows, scribbles(rows, 0), scribbles(rows, 1), strict=True):
        chosen, rejected = prefer(row["keywords"], a, b)
        assert {chosen, rejected} == {a, b}
        lead = gold_score(row["keywords"], chosen) - gold_score(row["keywords"], rejected)
        assert lead >= -LENGTH_BIAS * (len(chosen.split()) - len(rejected.split())) - 1e-12


def test_the_weak_writer_leaves_room_for_improvement():
    rows = writing_rows(500, "train")
    told = weak_responses(rows)
    assert [prompt for prompt, _ in told] == [row["prompt"] for row in rows]
    assert all(2 <= len(text.split()) <= 12 and set(text.split()) <= set(WORDS) for _, text in told)
    score = np.mean([gold_score(row["keywords"], text) for row, (_, text) in zip(rows, told, strict=True)])
    best = np.mean([gold_score(row["keywords"], " ".join([*row["keywords"], BEST, SECOND, THIRD])) for row in rows])
    assert score < best - 1
    assert told == weak_responses(rows)
    assert told != weak_responses(rows, seed=1)


def test_scribbles_cover_lengths_keywords_and_repetitions():
    rows = writing_rows(2000, "train")
    texts = [text.split() for text in scribbles(rows)]
    assert {len(words) for words in texts} == set(range(1, MAX_WORDS + 1))
    assert all(set(words) <= set(WORDS) for words in texts)
    covered = np.mean([all(k in words for k in row["keywords"]) for row, words in zip(rows, texts, strict=True)])
    assert 0.2 < covered < 0.7
    assert 0.2 < np.mean([len(set(words)) < len(words) for words in texts]) < 0.95


def test_the_gold_reward_is_the_score():
    assert gold_reward(["x"], [f"{BEST} {SECOND} {THIRD}"], keywords=[[BEST, SECOND]]) == [
        gold_score([BEST, SECOND], f"{BEST} {SECOND} {THIRD}")
    ]
    with pytest.raises(UserError, match="gold needs the dataset column 'keywords'; the dataset has: none"):
        gold_reward(["x"], ["y"])


def test_vocabulary():
    assert len(VOCABULARY) == len({*WORDS, COLON})
    assert set(VOCABULARY) == {*WORDS, COLON}
    with pytest.raises(UserError, match="unknown split 'valid'"):
        writing_rows(1, "valid")
