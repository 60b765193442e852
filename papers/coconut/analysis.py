"""What happens between question and answer on ProsQA graphs: path classes and values of frontier nodes.

Graph code on rows with the keys of `papers.coconut.data.GRAPH_KEYS`, in either encoding; what the model wrote and the
probabilities it gave come in as strings and arrays.

In the text encoding a step is a sentence, `Every blix is a dwung.`; in the facts encoding the node that it leads to. So
after k thoughts the first word that names a node is, in sentences (after `Every`), the node reached by k edges, and in
facts the one reached by k + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from papers.coconut.method import is_correct
from papers.coconut.prosqa import distances, sentence

PATH_CLASSES = (
    "correct_path",  # a shortest path (any of them)
    "longer_path",  # a longer path to the target
    "hallucination",  # an edge that does not exist, or pieces that do not connect
    "wrong_target",  # a path to another node
    "correct_label",  # no path written, right answer
    "incorrect_label",  # no path written, wrong answer
)


def classify(row: dict, text: str, k: int) -> str:
    """The class of PATH_CLASSES of `text`, generated after k steps' worth of thoughts (Section 4).

    The path written after thoughts lacks its first k edges. It counts as what it becomes with a prefix of k edges from
    the root; it is a hallucination if no such prefix leads to its beginning.
    """
    written = text.partition("#")[0]
    if not written.strip():
        return "correct_label" if is_correct(text, row["answer"]) else "incorrect_label"
    nodes = written_nodes(row, written)
    n_before = n_edges_before(row, k)
    edges = {tuple(edge) for edge in row["edges"]}
    connected = all(edge in edges for edge in pairwise(nodes))
    if not connected or nodes[0] not in frontier(row, n_before):
        return "hallucination"
    if nodes[-1] != row["target"]:
        return "wrong_target"
    shortest = distances(row["edges"], row["root"])[row["target"]]
    return "correct_path" if n_before + len(nodes) - 1 == shortest else "longer_path"


def written_nodes(row: dict, written: str) -> list[int]:
    """The nodes that a written path visits, in order; -1 for what is no node and between pieces that do not connect."""
    if is_facts(row):
        number = {symbol: v for v, symbol in enumerate(row["idx_to_symbol"])}
        return [number.get(word, -1) for word in written.split()]
    edge_of = {sentence(row["idx_to_symbol"], row["edges"], edge): edge for edge in row["edges"]}
    nodes: list[int] = []
    for line in re.split(r"(?<=\.)\s+", written.strip()):
        source, destination = edge_of.get(line, (-1, -1))
        if not nodes:
            nodes.append(source)
        elif nodes[-1] != source:
            nodes.append(-1)
        nodes.append(destination)
    return nodes


def is_facts(row: dict) -> bool:
    """Whether `row` is in the facts encoding, where a step is the name of a node."""
    return row["steps"][0] in row["idx_to_symbol"]


def n_edges_before(row: dict, k: int) -> int:
    """Edges from the root to the first node named after k steps' worth of thoughts."""
    return k + 1 if is_facts(row) else k


def frontier(row: dict, n_edges: int) -> list[int]:
    """The nodes at the ends of paths of exactly `n_edges` edges from the root: 1, its children; 2, grandchildren."""
    nodes = {row["root"]}
    for _ in range(n_edges):
        nodes = {b for a, b in row["edges"] if a in nodes}
    return sorted(nodes)


def heights(row: dict) -> np.ndarray:
    """`[nodes]` fewest edges from each node to a leaf (Section 4; the caption of the tree figure says most edges)."""
    sources = {a for a, _ in row["edges"]}
    leaves = [v for v in range(len(row["idx_to_symbol"])) if v not in sources]
    backward = [(b, a) for a, b in row["edges"]]
    from_leaves = [distances(backward, leaf) for leaf in leaves]
    return np.array([min(d[v] for d in from_leaves if v in d) for v in range(len(row["idx_to_symbol"]))])


def reaches_target(row: dict) -> np.ndarray:
    """`[nodes]` bool: the target is the node itself or below it."""
    above = distances([(b, a) for a, b in row["edges"]], row["target"])
    return np.array([v in above for v in range(len(row["idx_to_symbol"]))])


def frontier_values(row: dict, k: int, value_N: Sequence[float]) -> list[dict]:
    """One record per frontier node after k steps' worth of thoughts, highest value first.

    Args:
        value_N: for each node of the row, the probability that the model names it next: the product of the
            probabilities of its name's tokens, after `Every` in the text encoding.

    Returns:
        dicts of `node`, `symbol`, `value`, `height` and `correct` (can reach the target).
    """
    if len(value_N) != len(row["idx_to_symbol"]):
        raise ValueError(f"{len(value_N)} values for {len(row['idx_to_symbol'])} nodes")
    height_N, correct_N = heights(row), reaches_target(row)
    records = [
        {
            "node": v,
            "symbol": row["idx_to_symbol"][v],
            "value": float(value_N[v]),
            "height": int(height_N[v]),
            "correct": bool(correct_N[v]),
        }
        for v in frontier(row, n_edges_before(row, k))
    ]
    return sorted(records, key=lambda record: -record["value"])


def cumulative_top(cases: Iterable[Sequence[float]], most: int = 3) -> np.ndarray:
    """`[most, cases]`: for m = 1..most, the sum of each test case's m highest values, sorted over cases (Section 4).

    Wide gaps between the curves mean that the model keeps several nodes in play. Case i of n is at percentile
    100·(i + 1/2)/n. A case with fewer than m nodes contributes all of them.
    """
    sums = []
    for values in cases:
        highest = np.sort(np.asarray(values, dtype=float))[::-1][:most]
        sums.append(np.cumsum(np.pad(highest, (0, most - len(highest)))))
    return np.sort(np.array(sums).reshape(-1, most).T, axis=1)


def values_by_height(records: Iterable[dict]) -> dict[tuple[int, bool], np.ndarray]:
    """The values of records of `frontier_values`, by (height, correct), in order of height."""
    groups: dict[tuple[int, bool], list[float]] = {}
    for record in records:
        groups.setdefault((record["height"], record["correct"]), []).append(record["value"])
    return {key: np.array(groups[key]) for key in sorted(groups)}
