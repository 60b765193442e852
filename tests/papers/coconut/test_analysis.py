from itertools import pairwise

import numpy as np
import pytest

from papers.coconut.analysis import (
    PATH_CLASSES,
    classify,
    cumulative_top,
    frontier,
    frontier_values,
    heights,
    reaches_target,
    values_by_height,
)
from papers.coconut.data import load_json
from papers.coconut.prosqa import balanced_rows, prosqa_rows

#   Ada ─> b ─> d ─> f        two shortest paths to f, over b and over c, and a longer one, c ─> e ─> d ─> f
#     └──> c ─> d             e ─> g: a leaf that is not the target
#          └──> e ─> d, g     Leon ─> h: the distractor, out of reach
NAMES = ["Ada", "bix", "cix", "dix", "eix", "fix", "gix", "Leon", "hix"]
EDGES = [[0, 1], [0, 2], [1, 3], [2, 3], [2, 4], [4, 3], [3, 5], [4, 6], [7, 8]]
GRAPH = {"idx_to_symbol": NAMES, "edges": EDGES, "root": 0, "target": 5, "neg_target": 8}
TEXT = {
    "question": "... Is Ada a fix or hix?",
    "steps": ["Ada is a bix.", "Every bix is a dix.", "Every dix is a fix."],
    "answer": "Ada is a fix.",
    **GRAPH,
}
FACTS = {"question": "... ? Ada fix hix", "steps": ["bix", "dix", "fix"], "answer": "fix", **GRAPH}


@pytest.mark.parametrize(
    ("k", "written", "expected"),
    [
        (0, "Ada is a bix. Every bix is a dix. Every dix is a fix.", "correct_path"),
        (0, "Ada is a cix. Every cix is a dix. Every dix is a fix.", "correct_path"),  # not the gold one
        (0, "Ada is a cix.\nEvery cix is a dix.\nEvery dix is a fix.\n", "correct_path"),
        (0, "Ada is a cix. Every cix is a eix. Every eix is a dix. Every dix is a fix.", "longer_path"),
        (0, "Ada is a cix. Every cix is a eix. Every eix is a gix.", "wrong_target"),
        (0, "Ada is a bix.", "wrong_target"),
        (0, "Ada is a dix. Every dix is a fix.", "hallucination"),  # no such edge
        (0, "Ada is a bix. Every dix is a fix.", "hallucination"),  # does not connect
        (0, "Ada is a bix. Every cix is a dix. Every dix is a fix.", "hallucination"),  # nor if bix is a dix, too
        (0, "Every bix is a dix. Every dix is a fix.", "hallucination"),  # does not begin at the root
        (0, "Leon is a hix.", "hallucination"),
        (0, "Ada is a bix. Every bix is a dix. Every dix is a", "hallucination"),  # cut short
        (0, "Every Ada is a bix. Every bix is a dix. Every dix is a fix.", "hallucination"),
        (0, "bix dix fix", "hallucination"),
        (1, "Every bix is a dix. Every dix is a fix.", "correct_path"),
        (1, "Every cix is a eix. Every eix is a dix. Every dix is a fix.", "longer_path"),
        (1, "Every cix is a eix.", "wrong_target"),
        (1, "Every dix is a fix.", "hallucination"),  # no path of one edge leads to dix
        (1, "Ada is a bix. Every bix is a dix. Every dix is a fix.", "hallucination"),
        (2, "Every dix is a fix.", "correct_path"),
        (2, "Every eix is a dix. Every dix is a fix.", "longer_path"),
        (2, "Every eix is a gix.", "wrong_target"),
        (2, "Every bix is a dix. Every dix is a fix.", "hallucination"),
        (3, "Every dix is a fix.", "longer_path"),  # three edges: over cix and eix
    ],
)
def test_classes_of_sentences(k, written, expected):
    for answer in ("### Ada is a fix.", "### Ada is a hix.", ""):
        assert classify(TEXT, f"{written} {answer}", k) == expected


@pytest.mark.parametrize(
    ("k", "written", "expected"),
    [
        (0, "bix dix fix", "correct_path"),
        (0, "cix dix fix", "correct_path"),
        (0, "cix eix dix fix", "longer_path"),
        (0, "cix eix gix", "wrong_target"),
        (0, "cix", "wrong_target"),
        (0, "dix fix", "hallucination"),
        (0, "bix fix", "hallucination"),
        (0, "hix", "hallucination"),
        (0, "Ada bix dix fix", "hallucination"),
        (0, "bix dix zix", "hallucination"),
        (0, "zix", "hallucination"),
        (1, "dix fix", "correct_path"),
        (1, "eix dix fix", "longer_path"),
        (1, "eix", "wrong_target"),
        (1, "bix", "hallucination"),
        (2, "fix", "correct_path"),
        (2, "dix fix", "longer_path"),
        (2, "gix", "wrong_target"),
        (2, "hix", "hallucination"),
        (3, "fix", "longer_path"),
        (4, "fix", "hallucination"),
    ],
)
def test_classes_of_node_names(k, written, expected):
    for answer in ("### fix", "### hix", ""):
        assert classify(FACTS, f"{written} {answer}", k) == expected


@pytest.mark.parametrize("k", [0, 2, 6])
def test_without_a_path_the_answer_decides(k):
    assert classify(TEXT, "### Ada is a fix.", k) == "correct_label"
    assert classify(TEXT, " \n### Ada is a hix.", k) == "incorrect_label"
    assert classify(FACTS, "### fix", k) == "correct_label"
    assert classify(FACTS, "### hix", k) == "incorrect_label"
    assert classify(FACTS, "", k) == "incorrect_label"


# ---- against enumeration of all paths -----------------------------------------------------------------------------


def paths_from(row: dict, node: int) -> list[list[int]]:
    """Every path that begins at `node`, including the one that stays there."""
    found = [[node]]
    for a, b in row["edges"]:
        if a == node:
            found += [[node, *rest] for rest in paths_from(row, b)]
    return found


def write(row: dict, path: list[int], k: int, facts: bool) -> str:
    """What is written of `path` when its first k edges are not."""
    names, children = row["idx_to_symbol"], {b for _, b in row["edges"]}
    if facts:
        return " ".join(names[v] for v in path[k + 1 :])
    edges = list(pairwise(path))[k:]
    return " ".join(f"{'Every ' if a in children else ''}{names[a]} is a {names[b]}." for a, b in edges)


def expected_class(row: dict, written: str, k: int, facts: bool) -> str:
    """The definition, literally: try every path from the root as the completed one."""
    paths = paths_from(row, row["root"])
    shortest = min(len(path) for path in paths if path[-1] == row["target"])
    completions = [path for path in paths if len(path) > k + 1 and write(row, path, k, facts) == written]
    if not completions:
        return "hallucination"
    if completions[0][-1] != row["target"]:
        return "wrong_target"
    return "correct_path" if any(len(path) == shortest for path in completions) else "longer_path"


@pytest.mark.parametrize("facts", [True, False])
def test_classes_against_all_paths(facts):
    rng = np.random.default_rng(0)
    seen = dict.fromkeys(PATH_CLASSES, 0)
    rows = balanced_rows(40 if facts else 12, "train", encoding="facts" if facts else "text") + (
        prosqa_rows(4, "dev") * (not facts)
    )
    for row in rows:
        nodes = range(len(row["idx_to_symbol"]))
        starts = [path for v in nodes for path in paths_from(row, v)]
        for k in range(4):
            # True continuations after k edges, after another number of edges, from elsewhere, and broken ones.
            candidates = [write(row, path, cut, facts) for path in paths_from(row, row["root"]) for cut in range(k + 2)]
            candidates += [write(row, starts[i], 0, facts) for i in rng.integers(0, len(starts), 10)]
            for i in rng.integers(0, len(candidates), 10):
                pieces = candidates[i].split() if facts else candidates[i].split(". ")
                rng.shuffle(pieces)
                candidates.append((" " if facts else ". ").join(pieces))
            for written in set(candidates) - {""}:
                expected = expected_class(row, written, k, facts)
                assert classify(row, f"{written} ### ?", k) == expected, (written, k)
                seen[expected] += 1
    assert all(seen[name] > 20 for name in PATH_CLASSES[:4]), seen


@pytest.mark.parametrize("make", [prosqa_rows, balanced_rows, lambda *a: balanced_rows(*a, encoding="text")])
def test_gold_steps_are_correct_paths(make):
    for row in make(30, "test"):
        for k in range(len(row["steps"])):
            assert classify(row, "\n".join([*row["steps"][k:], f"### {row['answer']}"]), k) == "correct_path"
        assert classify(row, f"### {row['answer']}", len(row["steps"])) == "correct_label"


def test_gold_steps_of_the_released_rows_are_correct_paths(real_data):
    for row in load_json(real_data / "prosqa" / "valid.json"):
        assert classify(row, "\n".join([*row["steps"], f"### {row['answer']}"]), 0) == "correct_path"
        assert classify(row, row["steps"][-1], len(row["steps"]) - 1) == "correct_path"


# ---- values -------------------------------------------------------------------------------------------------------


def test_frontiers_heights_and_correct_nodes():
    assert [frontier(TEXT, n) for n in range(6)] == [[0], [1, 2], [3, 4], [3, 5, 6], [5], []]
    assert heights(TEXT).tolist() == [3, 2, 2, 1, 1, 0, 0, 1, 0]
    assert reaches_target(TEXT).tolist() == [True] * 6 + [False] * 3


def test_graph_measures_against_all_paths():
    for row in prosqa_rows(15, "dev") + balanced_rows(15, "dev"):
        nodes = range(len(row["idx_to_symbol"]))
        paths = [paths_from(row, v) for v in nodes]
        leaves = {v for v in nodes if len(paths[v]) == 1}
        assert heights(row).tolist() == [min(len(p) - 1 for p in paths[v] if p[-1] in leaves) for v in nodes]
        assert reaches_target(row).tolist() == [any(p[-1] == row["target"] for p in paths[v]) for v in nodes]
        for n in range(6):
            assert frontier(row, n) == sorted({p[-1] for p in paths[row["root"]] if len(p) == n + 1})


def test_frontier_values():
    values = [0.9, 0.1, 0.2, 0.3, 0.05, 0.4, 0.0, 0.8, 0.7]
    after_one_thought = frontier_values(TEXT, 1, values)  # `Every ...`: the children of the root
    assert after_one_thought == [
        {"node": 2, "symbol": "cix", "value": 0.2, "height": 2, "correct": True},
        {"node": 1, "symbol": "bix", "value": 0.1, "height": 2, "correct": True},
    ]
    assert frontier_values(FACTS, 0, values) == after_one_thought  # the step itself is the node
    after_two = [(r["symbol"], r["value"], r["height"], r["correct"]) for r in frontier_values(FACTS, 2, values)]
    assert after_two == [("fix", 0.4, 0, True), ("dix", 0.3, 1, True), ("gix", 0.0, 0, False)]
    with pytest.raises(ValueError, match="8 values for 9 nodes"):
        frontier_values(TEXT, 1, values[:8])


def test_cumulative_top():
    curves = cumulative_top([[0.1, 0.5, 0.2, 0.1], [0.9], [0.3, 0.4]])
    # Sums of the cases: (.5, .7, .8), (.9, .9, .9), (.4, .7, .7); each curve sorted by itself.
    np.testing.assert_allclose(curves, [[0.4, 0.5, 0.9], [0.7, 0.7, 0.9], [0.7, 0.8, 0.9]])
    assert cumulative_top([]).shape == (3, 0)
    assert cumulative_top([[0.5]], most=2).tolist() == [[0.5], [0.5]]


def test_values_by_height():
    records = frontier_values(FACTS, 2, np.arange(9) / 10) + frontier_values(FACTS, 2, np.arange(9) / 20)
    groups = values_by_height(records)
    assert list(groups) == [(0, False), (0, True), (1, True)]
    assert {key: sorted(values) for key, values in groups.items()} == {
        (0, False): [0.3, 0.6],
        (0, True): [0.25, 0.5],
        (1, True): [0.15, 0.3],
    }
