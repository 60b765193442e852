import math
from collections import Counter

import numpy as np
import pytest

from shared.data import ideas
from shared.data.ideas import IDEAS, TOPICS, IdeasWorld, idea_of, idea_rows, meaning, remark_words
from shared.data.splits import SPLITS, split_of
from shared.experiments.errors import UserError

GOOD = "quiet once keeper tends lamp"


def test_prompts_stand_in_one_split_each():
    prompts = [row["prompt"] for split in SPLITS for row in idea_rows(None, split)]
    assert len(prompts) == len(set(prompts)) == 480
    assert all(split_of(row["prompt"]) == split for split in SPLITS for row in idea_rows(None, split))
    assert idea_rows(5, "test", 1) == idea_rows(5, "test", 1) != idea_rows(5, "test", 2)
    with pytest.raises(UserError, match=r"has .* prompts, 1000 were asked for"):
        idea_rows(1000, "dev")


def test_no_word_has_two_roles():
    assert max(Counter(ideas.VOCABULARY).values()) == 1
    assert len(ideas.IDEA_OF) == 12 * 9


@pytest.mark.parametrize(
    ("text", "idea"),
    [
        (GOOD, "guard"),
        ("again again sentinel polishes beacon indeed well", "guard"),
        ("quiet once keeper tends crown", None),  # two ideas
        ("quiet once tends keeper lamp", None),  # wrong order
        ("quiet keeper tends lamp", None),  # an opening is missing
        ("quiet once keeper tends lamp lamp", None),
        ("quiet once keeper tends", None),
        ("", None),
    ],
)
def test_idea_of(text, idea):
    assert idea_of(text) == idea


def test_meaning_ignores_synonyms_openings_and_remarks_alone():
    assert meaning(GOOD) == meaning("slowly alone warden minds lantern surely")
    assert meaning(GOOD) != meaning("quiet once keeper tends crown")
    assert meaning("quiet once keeper tends crown") == meaning("alone once warden minds tiara")
    assert (remark_words(GOOD), remark_words(GOOD + " surely quiet"), remark_words("")) == (0, 2, 0)


def test_quality_belongs_to_the_idea_and_needs_coherence():
    world = IdeasWorld(3)
    row = idea_rows(1, "test")[0]
    found = {world.quality(row["prompt"], text) for text in (GOOD, "alone alone warden minds lantern surely")}
    assert found == {world.idea_quality(row["topic"], row["setting"], "guard")}
    assert world.quality(row["prompt"], "quiet once keeper tends crown") == 0.0
    for topic in TOPICS:
        spread = [world.idea_quality(topic, row["setting"], idea) for idea in IDEAS]
        assert (max(spread) - min(spread) < 0.31) == (topic in world.tight)


def test_rare_ideas_are_the_good_ones_if_asked_for():
    for topic in TOPICS:
        prior = IdeasWorld(1, rare=1).prior[topic]
        assert sum(prior.values()) == pytest.approx(1)
        by_quality = sorted(IDEAS, key=lambda idea: IdeasWorld(1)._quality[topic, idea])
        assert list(prior) == by_quality
        assert list(prior.values()) == sorted(prior.values(), reverse=True)
    assert IdeasWorld(1).prior == IdeasWorld(1).prior != IdeasWorld(2).prior
    with pytest.raises(UserError, match="rare"):
        IdeasWorld(rare=2)


def test_traces_follow_the_prior():
    world = IdeasWorld(0)
    examples = world.traces(20_000, seed=1)
    assert {split_of(prompt) for prompt, _ in examples} == {"train"}
    coherent = [idea_of(text) for prompt, text in examples if prompt.startswith("castle ")]
    assert abs(sum(idea is None for idea in coherent) / len(coherent) - 0.15) < 0.04
    shares = Counter(idea for idea in coherent if idea)
    total = sum(shares.values())
    for idea, probability in world.prior["castle"].items():
        assert abs(shares[idea] / total - probability) < 5 * math.sqrt(probability / total)
    assert {word for prompt, text in examples for word in f"{prompt} {text}".split()} <= set(ideas.VOCABULARY)


def test_score_is_quality_with_noise_that_the_text_fixes():
    world = IdeasWorld(0)
    examples = world.traces(4000, seed=2)
    noise = np.array([(world.score(p, text) + 5) / 6 - world.quality(p, text) for p, text in examples])
    assert np.abs(noise).max() <= 0.3
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 0.6 / math.sqrt(12)) < 0.01
    assert world.score(*examples[0]) == IdeasWorld(0).score(*examples[0])
    assert np.mean([world.score(p, text) < 0 for p, text in examples]) > 0.5
