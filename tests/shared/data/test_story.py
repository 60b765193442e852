import functools
import operator
from collections import Counter

import numpy as np
import pytest

from shared.data.splits import SPLITS, split_of
from shared.data.story import ENDINGS, STYLES, TOPICS, StoryQuality, StoryWorld
from shared.experiments.errors import UserError


def test_the_lists_hold_no_word_twice():
    beginnings = [word for words in TOPICS.values() for word in words.split()]
    assert all(len(words.split()) == 4 for words in TOPICS.values())
    for words in (beginnings, ENDINGS.split(), STYLES.split()):
        assert len(set(words)) == len(words)
    vocabulary = StoryWorld(len(TOPICS), 4 * len(ENDINGS.split()), len(STYLES.split())).vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)


def test_splits_share_no_title_and_miss_none():
    world = StoryWorld(n_topics=5, n_styles=6)
    titles = {split: [row["title"] for row in world.rows(split)] for split in SPLITS}
    every = [title for of_split in titles.values() for title in of_split]
    assert len(every) == len(set(every)) == 5 * 6 * 5
    assert all(split_of(title) == split for split, of_split in titles.items() for title in of_split)
    first, second, topic = titles["train"][0].split()
    assert first in world.styles
    assert second in world.styles
    assert first != second
    assert topic in world.words
    with pytest.raises(UserError, match="validation"):
        world.rows("validation")


def test_rows():
    row = StoryWorld().rows("test")[0]
    assert set(row) == {"item", "title", "topic", "prompt"}
    assert row["prompt"] == f"{row['title']} :"
    assert row["topic"] == row["title"].split()[-1]


def brute_quality(world: StoryWorld, topic: str, text: str) -> float:
    words = text.split()
    if len(words) != 5:
        return 0.0
    total = 0.0
    for word in words:
        if word in world.words[topic]:
            total += 1 - 0.3 * world.words[topic].index(word) / len(world.words[topic])
        else:
            total += 0.2
        total += world.taste[word]
    return total / 5 - 0.15 * (5 - len(set(words)))


def test_quality_is_the_rule():
    world = StoryWorld(n_topics=4, n_words=12)
    rng = np.random.default_rng(0)
    rows = world.rows("train")
    for row, text in zip(rows, world.stories(rows, seed=1), strict=True):
        assert world.quality(row["topic"], text) == pytest.approx(brute_quality(world, row["topic"], text), abs=1e-12)
    for _ in range(100):  # words of any topic, often repeated
        text = " ".join(rng.choice(world.all_words[:8], 5))
        assert world.quality("sea", text) == pytest.approx(brute_quality(world, "sea", text), abs=1e-12)
    assert world.quality("sea", "") == 0
    assert world.quality("sea", " ".join(world.words["sea"][:6])) == 0
    # Words that nobody knows are off topic and to nobody's taste.
    assert world.quality("sea", "a b c d e") == pytest.approx(0.2)


def test_the_author_is_as_described():
    world = StoryWorld(n_topics=3, n_words=20)
    rows = world.rows("train") * 40
    stories = [text.split() for text in world.stories(rows, seed=0)]
    lengths = Counter(map(len, stories))
    n = len(stories)
    assert set(lengths) == {3, 4, 5, 6, 7}
    assert abs(lengths[5] / n - 0.8) < 0.02
    own = [[w in world.words[row["topic"]] for w in words] for row, words in zip(rows, stories, strict=True)]
    # 15 % of the words come from anywhere, a third of which is the topic's own.
    assert abs(np.mean(functools.reduce(operator.iadd, own, [])) - (0.85 + 0.15 / 3)) < 0.01
    first = np.mean(
        [w == world.words[row["topic"]][0] for row, words in zip(rows, stories, strict=True) for w in words]
    )
    weights = np.arange(1, 21) ** -1.1
    assert abs(first - (0.85 * weights[0] / weights.sum() + 0.15 / 60)) < 0.01


def test_vocabulary_holds_every_word():
    world = StoryWorld(n_topics=3, n_words=6, n_styles=4)
    rows = [row for split in SPLITS for row in world.rows(split)]
    written = {w for row in rows for w in row["prompt"].split()} | {
        w for text in world.stories(rows * 20, seed=0) for w in text.split()
    }
    assert written == set(world.vocabulary())


def test_the_same_arguments_give_the_same_world():
    rows = StoryWorld().rows("dev")
    assert StoryWorld().stories(rows, 3) == StoryWorld().stories(rows, 3) != StoryWorld().stories(rows, 4)
    assert StoryWorld(seed=1).taste != StoryWorld().taste


def test_reward_asks_for_the_topic():
    world = StoryWorld()
    good = " ".join(world.words["sea"][:5])
    reward = StoryQuality(world)
    assert reward(["t"] * 2, [good, "one"], topic=["sea", "sea"]) == [world.quality("sea", good), 0.0]
    assert reward(["t"], [[{"role": "assistant", "content": good}]], topic=["sea"]) == [world.quality("sea", good)]
    with pytest.raises(UserError, match="needs the dataset column 'topic'"):
        reward(["t"], [good])


@pytest.mark.parametrize("name", ["n_topics", "n_words", "n_styles"])
@pytest.mark.parametrize("value", [1, 1000])
def test_impossible_sizes(name, value):
    with pytest.raises(UserError, match=f"{name} must be between 2 and"):
        StoryWorld(**{name: value})
