import numpy as np
import pytest

from shared.rewards.diversity import (
    NGramDiversityReward,
    SemanticDiversityReward,
    class_diversity,
    ngram_diversity,
    semantic_classes,
    word_rarity,
)


def test_the_papers_example_two_equivalent_and_two_single():
    assert class_diversity([7, 7, 3, 5]) == pytest.approx([2 / 3, 2 / 3, 1, 1])


def test_class_diversity_limits():
    assert class_diversity([0, 0, 0, 0]).tolist() == [0.1] * 4  # the floor
    assert class_diversity([0, 0, 0, 0], floor=0).tolist() == [0] * 4
    assert class_diversity(list(range(8))).tolist() == [1] * 8
    with pytest.raises(ValueError, match="at least 2"):
        class_diversity([0])


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_the_transitive_closure(seed):
    """Against Warshall's algorithm on the matrix of equal pairs; diversity against Eq. 4's sum."""
    rng = np.random.default_rng(seed)
    n = 9
    texts = [f"{i}" for i in range(n)]
    texts[n - 1] = texts[0]  # equal texts need no question
    related = np.triu(rng.random((n, n)) < 0.12, 1)
    asked = []

    def same(pairs):
        asked.extend(pairs)
        return [related[int(a), int(b)] for a, b in pairs]

    (classes,) = semantic_classes([texts], same)
    reach = np.eye(n, dtype=bool)
    for i in range(n):
        for j in range(i + 1, n):
            a, b = int(texts[i]), int(texts[j])
            reach[i, j] = reach[j, i] = a == b or related[a, b]
    for k in range(n):
        reach |= reach[:, k : k + 1] & reach[k : k + 1]
    assert (np.equal.outer(classes, classes) == reach).all()
    assert len(asked) == len(set(asked))
    assert all(a != b for a, b in asked)
    expected = [max(0.1, sum(not reach[i, j] for j in range(n) if j != i) / (n - 1)) for i in range(n)]
    assert class_diversity(classes) == pytest.approx(expected)


def test_semantic_reward_asks_once_and_never_across_prompts():
    calls = []

    def same(pairs):
        calls.append(pairs)
        return [a[0] == b[0] for a, b in pairs]

    reward = SemanticDiversityReward(3, same)
    # the same prompt twice: two groups, not one
    assert reward(["p"] * 6, ["a1", "a2", "b", "a3", "é", "z"]) == [0.5, 0.5, 1, 1, 1, 1]
    assert len(calls) == 1
    assert set(calls[0]) == {("a1", "a2"), ("a1", "b"), ("a2", "b"), ("a3", "é"), ("a3", "z"), ("é", "z")}
    assert reward(["p"] * 3, ["", "", ""]) == [0.1] * 3
    assert len(calls) == 1  # equal texts, nothing to ask


def test_groups_must_be_whole():
    reward = NGramDiversityReward(2)
    with pytest.raises(ValueError, match="3 completions are not groups of 2"):
        reward(["p"] * 3, ["a"] * 3)
    with pytest.raises(ValueError, match="row 1: its prompt is not that of row 0"):
        reward(["p", "q"], ["a", "b"])
    with pytest.raises(ValueError, match="1 prompts for 2"):
        reward(["p"], ["a", "b"])
    with pytest.raises(ValueError, match="at least 2"):
        SemanticDiversityReward(1, lambda pairs: [])
    with pytest.raises(ValueError, match="at least 2"):
        NGramDiversityReward(1)
    with pytest.raises(ValueError, match="0 answers for 1 pairs"):
        SemanticDiversityReward(2, lambda pairs: [])(["p"] * 2, ["a", "b"])


def test_ngram_diversity_by_a_literal_loop():
    rng = np.random.default_rng(0)
    group = [" ".join(rng.choice(list("abc"), size=length)) for length in (3, 4, 9, 12, 12)]
    for n in (1, 2, 4):
        expected = []
        for i, text in enumerate(group):
            tokens = text.split()
            mine = [" ".join(tokens[t : t + n]) for t in range(len(tokens) - n + 1)]
            others = set()
            for j, other in enumerate(group):
                words = other.split()
                if j != i:
                    others |= {" ".join(words[t : t + n]) for t in range(len(words) - n + 1)}
            expected.append(len(set(mine) - others) / len(mine) if mine else 0)
        assert ngram_diversity(group, n) == pytest.approx(expected)


def test_ngram_diversity_limits():
    assert ngram_diversity(["a b c d e", "v w x y z"]).tolist() == [1, 1]
    assert ngram_diversity(["a b c d e"] * 2).tolist() == [0, 0]
    assert ngram_diversity(["a b c", "", "ä b c d"]).tolist() == [0, 0, 1]
    assert NGramDiversityReward(2)(["p"] * 4, ["a b c d", "a b c d", "a b c d", "w x y z"]) == [0, 0, 1, 1]


def test_word_rarity_by_hand():
    group = ['{"city": "Rome"}', '{"city": "Oslo"}', '{"city": "rome"}', "", "City Oslo Oslo Bern"]
    # city is in 4 of 5, rome in 2, oslo in 2, bern in 1
    assert word_rarity(group) == pytest.approx([-0.6, -0.6, -0.6, -1, -(0.8 + 0.4 + 0.2) / 3])
    assert word_rarity(group, ignore={"city"}) == pytest.approx([-0.4, -0.4, -0.4, -1, -0.3])
