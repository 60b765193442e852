"""Which completions become pairs, against the definition by enumeration."""

import itertools

import pytest

from shared.generation import Completion
from shared.training.pairs import Pool, best_vs_worst, right_vs_wrong, split_binary


def pool(*rewards):
    return Pool({"prompt": "p"}, [Completion(str(i), [i], None, "stop") for i in range(len(rewards))], list(rewards))


@pytest.mark.parametrize("rewards", list(itertools.product([0.0, 1.0, None], repeat=4)))
def test_right_vs_wrong_takes_the_first_of_each_and_skips_prompts_without_both(rewards):
    right = [i for i, r in enumerate(rewards) if r == 1]
    wrong = [i for i, r in enumerate(rewards) if r == 0]
    assert right_vs_wrong(pool(*rewards)) == ([(right[0], wrong[0])] if right and wrong else [])
    assert split_binary(pool(*rewards)) == (right, wrong)


@pytest.mark.parametrize("rewards", list(itertools.product([-1.5, 0.25, 2.0, None], repeat=3)))
def test_best_vs_worst_is_void_on_ties_only(rewards):
    known = [r for r in rewards if r is not None]
    found = best_vs_worst(pool(*rewards))
    if len(set(known)) < 2:
        assert found == []
    else:
        [(chosen, rejected)] = found
        assert rewards[chosen] == max(known)
        assert rewards[rejected] == min(known)


def test_a_verifier_that_grades_is_refused():
    with pytest.raises(ValueError, match=r"completion 1: a verifier's reward must be 0 or 1, not 0\.5"):
        right_vs_wrong(pool(1.0, 0.5))
