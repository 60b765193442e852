"""How different a sample is from the other samples of its prompt: by n-grams, by rare words, by meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shared.evaluation.diversity import Same, call_same, ngrams, words
from shared.rewards.contract import Completions, checked, texts


class NGramDiversityReward:
    """`ngram_diversity` of each completion among the `group_size` samples of its prompt, which follow each other."""

    __name__ = "ngram_diversity"

    def __init__(self, group_size: int, n: int = 4):
        _check_group_size(group_size)
        self.group_size, self.n = group_size, n

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        groups = _groups(prompts, completions, self.group_size)
        rewards = [value for group in groups for value in ngram_diversity(group, self.n)]
        return checked(rewards, len(completions), self.__name__)


class SemanticDiversityReward:
    """Share of the other samples of the prompt that do not mean the same (DARLING, arXiv 2509.02534, Section 3).

    The samples of a prompt (`group_size` rows that follow each other) are joined into classes with `semantic_classes`;
    the reward is `class_diversity`. `same` is called once for all groups, and not for equal texts.
    """

    __name__ = "semantic_diversity"

    def __init__(self, group_size: int, same: Same):
        _check_group_size(group_size)
        self.group_size, self.same = group_size, same

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        groups = _groups(prompts, completions, self.group_size)
        rewards = [value for classes in semantic_classes(groups, self.same) for value in class_diversity(classes)]
        return checked(rewards, len(completions), self.__name__)


def semantic_classes(groups: Sequence[Sequence[str]], same: Same) -> list[list[int]]:
    """For each group, the class number of each text: two texts share a class if a chain of pairs that mean the same
    connects them (transitive closure; DARLING, Section 3). `same` is asked no pair twice."""
    pairs = [
        (group, i, j)
        for group, members in enumerate(groups)
        for i, j in combinations(range(len(members)), 2)
        if members[i] != members[j]
    ]
    asked = [(groups[group][i], groups[group][j]) for group, i, j in pairs]
    unique = list(dict.fromkeys(asked))
    verdicts = dict(zip(unique, call_same(same, unique), strict=True)) if unique else {}
    edges: list[list[tuple[int, int]]] = [_equal_pairs(members) for members in groups]
    for (group, i, j), pair in zip(pairs, asked, strict=True):
        if verdicts[pair]:
            edges[group].append((i, j))
    return [_components(len(members), found) for members, found in zip(groups, edges, strict=True)]


def class_diversity(classes: Sequence[int], floor: float = 0.1) -> np.ndarray:
    """Div(y_i) = max(floor, (n - |C(y_i)|) / (n - 1)) for n texts, C(y_i) the class of y_i (DARLING, Eq. 4 with
    d = 1 between classes and 0 within).

    The floor keeps the product with a quality reward from vanishing; it is in the authors' code, not in the paper.
    """
    n = len(classes)
    _check_group_size(n)
    sizes = Counter(classes)
    return np.array([max(floor, (n - sizes[c]) / (n - 1)) for c in classes])


def ngram_diversity(group: Sequence[str], n: int = 4) -> np.ndarray:
    """Distinct n-grams that no other text of the group has, over all n-grams of the text (DARLING, Section 5: 4-grams,
    tokens split at white space).

    A text without n-grams (fewer than n tokens) gets 0; this is ours, the paper does not say.
    """
    grams = [ngrams(text.split(), n) for text in group]
    having = Counter(gram for found in grams for gram in set(found))
    return np.array([sum(having[g] == 1 for g in set(found)) / len(found) if found else 0.0 for found in grams])


def word_rarity(group: Sequence[str], ignore: Collection[str] = ()) -> np.ndarray:
    """D(y) = -mean over the distinct words w of y of f(w), f(w) the share of the group's texts that contain w.

    DivPO's word-frequency criterion (arXiv 2501.18101); its exact formula is not published, this one is ours.
    Larger is more diverse; -1 for a text without words, as if all others had the same.

    ignore: words of the format (JSON keys), as `shared.evaluation.diversity.words` writes them.
    """
    found = [set(words(text)) - set(ignore) for text in group]
    having = Counter(word for each in found for word in each)
    return np.array([-np.mean([having[w] for w in each]) / len(group) if each else -1.0 for each in found])


def _check_group_size(n: int) -> None:
    if n < 2:
        raise ValueError(f"diversity needs at least 2 samples per prompt, not {n}")


def _equal_pairs(members: Sequence[str]) -> list[tuple[int, int]]:
    first = {text: i for i, text in reversed(list(enumerate(members)))}
    return [(first[text], i) for i, text in enumerate(members) if first[text] != i]


def _components(n: int, edges: list[tuple[int, int]]) -> list[int]:
    i, j = np.array(edges, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(n, n))
    return connected_components(graph, directed=False)[1].tolist()


def _groups(prompts: Sequence, completions: Completions, size: int) -> list[list[str]]:
    """The texts in groups of `size` rows with one prompt."""
    found = texts(completions)
    if len(prompts) != len(found):
        raise ValueError(f"{len(prompts)} prompts for {len(found)} completions")
    if len(found) % size:
        raise ValueError(
            f"{len(found)} completions are not groups of {size}; in TRL, make per_device_train_batch_size x "
            "steps_per_generation a multiple of num_generations, so that no group is split between processes"
        )
    for row, prompt in enumerate(prompts):
        if prompt != prompts[row - row % size]:
            raise ValueError(f"row {row}: its prompt is not that of row {row - row % size}, though groups have {size}")
    return [found[start : start + size] for start in range(0, len(found), size)]
