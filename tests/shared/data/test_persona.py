import json
from collections import Counter

import numpy as np
import pytest

from shared.data.persona import ATTRIBUTES, CHATTER, PARTS, PROMPT, PersonaWorld
from shared.experiments.errors import UserError
from shared.rewards.format import parse_attributes


def test_a_clean_author_writes_json_with_the_keys_in_order():
    world = PersonaWorld(20, swapped=0, corrupted=0)
    for text in world.personas(200, seed=0):
        record = json.loads(text)
        assert tuple(record) == ATTRIBUTES
        assert all(record[name] in world.values[name] for name in ATTRIBUTES)


def test_every_corruption_is_noticed_and_nothing_else():
    personas = PersonaWorld(20, corrupted=1.0).personas(3000, seed=1)
    assert not any(parse_attributes(text, ATTRIBUTES) for text in personas)
    lengths = Counter(len(text.split()) for text in personas)
    # Of four slips, two lose a word, and two (a repetition, chatter) add one.
    assert set(lengths) == {9, 11}
    assert abs(lengths[9] / 3000 - 0.5) < 0.03
    assert {text.split()[0] for text in personas} >= {CHATTER[0]}
    assert {text.split()[-1] for text in personas} >= {CHATTER[1]}
    spoilt = PersonaWorld(20, corrupted=0.3).personas(5000, seed=1)
    assert abs(np.mean([parse_attributes(text, ATTRIBUTES) is None for text in spoilt]) - 0.3) < 0.03


def test_a_quarter_of_the_key_orders_is_random():
    world = PersonaWorld(20, swapped=0.25, corrupted=0)
    orders = Counter(tuple(json.loads(text)) for text in world.personas(6000, seed=2))
    assert len(orders) == 6
    assert abs(orders[ATTRIBUTES] / 6000 - (0.75 + 0.25 / 6)) < 0.02


def test_frequencies_are_zipf_by_rank():
    world = PersonaWorld(30, zipf=1.1, corrupted=0)
    counts = Counter(json.loads(text)["city"] for text in world.personas(20_000, seed=3))
    weights = np.arange(1, 31) ** -1.1
    expected = 20_000 * weights / weights.sum()
    found = np.array([counts[value] for value in world.values["city"]])
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected))


def test_the_vocabulary_holds_every_word():
    world = PersonaWorld(15)
    vocabulary = world.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)
    assert all(word.split() == [word] for word in vocabulary)
    written = {word for text in [PROMPT, *world.personas(3000, seed=4)] for word in text.split()}
    assert written == set(vocabulary)


def test_arguments_and_seeds_decide_everything():
    assert PersonaWorld(10).personas(20, 5) == PersonaWorld(10).personas(20, 5)
    assert PersonaWorld(10).personas(20, 5) != PersonaWorld(10).personas(20, 6)
    assert PersonaWorld(10, seed=1).values != PersonaWorld(10).values


def test_values_are_words_of_their_own_up_to_the_limit():
    world = PersonaWorld(2000)
    for name in ATTRIBUTES:
        assert len(set(world.values[name])) == 2000
        beginnings = PARTS[name][0].split()
        assert all(value.isalpha() and value.startswith(tuple(beginnings)) for value in world.values[name])
    for n in (0, 2001):
        with pytest.raises(UserError, match=r"n_values must be between 1 and 2000 \(first_name\), got"):
            PersonaWorld(n)
