import gzip

import numpy as np
import pytest
import scipy.stats

from shared.evaluation.diversity import (
    compression_ratio,
    distinct_classes,
    distinct_n,
    entropy,
    ngrams,
    sampled_entropy,
    sampled_entropy_per_token,
    top_share,
    unique_share,
    unique_words,
    words,
)


def test_words_drop_case_and_punctuation_of_any_script():
    assert words("The end, the END. «Fin» — 終わり。") == ["the", "end", "the", "end", "fin", "終わり"]
    assert words("first_name: O'Neil 3$") == ["firstname", "oneil", "3"]
    assert words("Cafe\u0301 café") == ["café", "café"]
    assert words("हिन्दी") == ["हिन्दी"]  # vowel signs are part of the word
    assert words(" ... \n") == words("") == []


def test_ngrams_and_distinct_n_by_hand():
    assert ngrams(["a", "b", "a", "b"], 2) == [("a", "b"), ("b", "a"), ("a", "b")]
    assert distinct_n("a b a b", 2) == 2 / 3
    assert distinct_n("a b a b", 4) == 1
    assert distinct_n("x x x x x x", 4) == 1 / 3
    assert np.isnan(distinct_n("a b c", 4))
    assert np.isnan(distinct_n("", 1))
    with pytest.raises(ValueError, match="at least 1"):
        ngrams(["a"], 0)


def test_unique_words_are_counted_over_all_texts():
    assert unique_words(["Sun, moon!", "moon star", ""]) == 3
    assert unique_words([]) == 0


def test_compression_ratio_is_larger_for_more_diverse_texts():
    rng = np.random.default_rng(0)
    varied = ["".join(chr(c) for c in rng.integers(97, 123, size=60)) for _ in range(16)]
    assert compression_ratio(varied) > 3 * compression_ratio([varied[0]] * 16)
    raw = " ".join(varied).encode()
    packed = gzip.compress(raw, mtime=0)
    assert gzip.decompress(packed) == raw
    assert compression_ratio(varied) == len(packed) / len(raw)
    with pytest.raises(ValueError, match="no text"):
        compression_ratio([""])


def test_entropy_of_values_is_scipys():
    rng = np.random.default_rng(0)
    values = [f"name{i}" for i in rng.geometric(0.2, size=500)]
    counts = np.unique(values, return_counts=True)[1]
    assert entropy(values) == pytest.approx(scipy.stats.entropy(counts), abs=1e-12)
    assert top_share(values) == counts.max() / 500
    assert entropy(["Astrid"] * 9) == 0
    assert entropy(list("abcd")) == pytest.approx(np.log(4))
    with pytest.raises(ValueError, match="no values"):
        entropy([])


def test_unique_share_uses_a_fixed_number_of_values():
    values = ["a", "b", "a", "c", "d"]
    assert unique_share(values, 4) == 3 / 4
    assert unique_share(values, 5) == 4 / 5
    with pytest.raises(ValueError, match=r"at least 6 values .* got 5"):
        unique_share(values, 6)


def test_sampled_entropy_estimates_the_entropy_of_the_distribution():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    lengths = rng.integers(1, 4, size=20_000)  # each response: that many independent tokens
    logprobs = [np.log(p[rng.choice(4, size=length, p=p)]) for length in lengths]
    per_token = scipy.stats.entropy(p)
    assert sampled_entropy_per_token(logprobs) == pytest.approx(per_token, abs=0.02)
    assert sampled_entropy(logprobs) == pytest.approx(per_token * lengths.mean(), abs=0.04)
    assert sampled_entropy([[-1.0, -2.0], []]) == 1.5
    with pytest.raises(ValueError, match="no responses"):
        sampled_entropy([])
    with pytest.raises(ValueError, match="no tokens"):
        sampled_entropy_per_token([[], []])


def test_distinct_classes_compares_with_the_first_member_of_each_class():
    def near(pairs):  # not transitive
        return [abs(int(a) - int(b)) <= 1 for a, b in pairs]

    assert distinct_classes(["1", "2", "3"], near) == 2  # 3 is near 2, but 2 opened no class
    assert distinct_classes(["2", "1", "3"], near) == 1
    assert distinct_classes(["7", "7", "7"], near) == 1
    assert distinct_classes([], near) == 0
    with pytest.raises(ValueError, match="1 answers for 2 pairs"):
        distinct_classes(["1", "3", "5"], lambda pairs: [False])
