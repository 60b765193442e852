import copy
import json
import re
from collections import Counter
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from scipy import stats

from papers.coconut.data import (
    CONCEPTS,
    PEOPLE,
    SPECIAL_TOKENS,
    VOCABULARY,
    fact_table,
    facts_tokenizer,
    load_json,
    save_json,
    word_tokenizer,
)
from papers.coconut.prontoqa import prontoqa_rows
from papers.coconut.prosqa import balanced_rows, canonical, prosqa_rows
from shared.data.arith import arith_rows
from shared.experiments.errors import UserError

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def prosqa():
    return prosqa_rows(800, "train")


@pytest.fixture(scope="module")
def balanced():
    return balanced_rows(1500, "train")


def graph(row: dict) -> nx.DiGraph:
    """The graph by node number, from the fields."""
    g = nx.DiGraph()
    g.add_nodes_from(range(len(row["idx_to_symbol"])))
    g.add_edges_from(map(tuple, row["edges"]))
    return g


def statistics(rows: list[dict]) -> dict[str, list[int]]:
    """Per row: what the paper's data is described by."""
    graphs = [graph(row) for row in rows]
    paths = [list(nx.all_shortest_paths(g, row["root"], row["target"])) for g, row in zip(graphs, rows, strict=True)]
    return {
        "nodes": [len(g) for g in graphs],
        "edges": [g.number_of_edges() for g in graphs],
        "steps": [len(p[0]) - 1 for p in paths],
        "paths": [len(p) for p in paths],
        "parentless": [sum(d == 0 for _, d in g.in_degree()) for g in graphs],
        "root_children": [g.out_degree(row["root"]) for g, row in zip(graphs, rows, strict=True)],
        "root": [row["root"] for row in rows],
    }


def check_question_text(row: dict) -> None:
    """A text row tells its graph, each edge once, asks about its nodes, and reasons along a shortest path."""
    g, name = graph(row), row["idx_to_symbol"]
    assert nx.is_directed_acyclic_graph(g)
    assert len(set(name)) == len(name)
    told = re.findall(r"(Every )?(\w+) is a (\w+)\.", row["question"])
    assert Counter((name.index(a), name.index(b)) for _, a, b in told) == Counter(map(tuple, row["edges"]))
    for every, a, _ in told:  # people are the nodes without parents
        assert bool(every) == (g.in_degree(name.index(a)) > 0) == (a in CONCEPTS) == (a not in PEOPLE)
    root, target, neg_target = (name[row[key]] for key in ("root", "target", "neg_target"))
    question = row["question"].rpartition(". ")[2]
    assert question in (f"Is {root} a {target} or {neg_target}?", f"Is {root} a {neg_target} or {target}?")
    assert row["answer"] == f"{root} is a {target}."
    path = [root]
    for step in row["steps"]:
        source, destination = re.fullmatch(r"(?:Every )?(\w+) is a (\w+)\.", step).groups()
        assert step in row["question"]
        assert source == path[-1]
        path.append(destination)
    assert path[-1] == target
    assert len(path) - 1 == nx.shortest_path_length(g, row["root"], row["target"])


def test_prosqa_rows_are_well_formed(prosqa):
    for row in prosqa:
        check_question_text(row)
        g = graph(row)
        assert min(d for _, d in g.degree()) >= 1  # no node is left out of the text
        assert g.out_degree(row["target"]) == g.out_degree(row["neg_target"]) == 0
        assert not nx.has_path(g, row["root"], row["neg_target"])
        assert not g.has_edge(row["root"], row["target"])


def test_prosqa_statistics(prosqa):
    """Against those of the 800 released validation and test rows, within about four standard errors."""
    s = statistics(prosqa)
    assert np.mean(s["nodes"]) == pytest.approx(23, abs=0.4)
    assert 12 <= min(s["nodes"]) <= max(s["nodes"]) <= 28
    assert np.mean(s["edges"]) == pytest.approx(36, abs=1.0)
    assert 5 < np.std(s["edges"]) < 7  # 16 to 54 in 800 rows
    steps = Counter(s["steps"])
    for n_steps, share in {3: 0.41, 4: 0.44, 5: 0.13, 6: 0.02}.items():
        assert steps[n_steps] / len(prosqa) == pytest.approx(share, abs=0.07)
    assert np.mean(s["paths"]) == pytest.approx(1.6, abs=0.15)
    assert np.mean(np.equal(s["parentless"], 2)) == pytest.approx(0.58, abs=0.07)
    assert np.mean(np.equal(s["root_children"], 1)) == pytest.approx(0.09, abs=0.05)
    assert np.mean(np.isin(s["root_children"], [2, 3, 4])) > 0.7
    first = [row["question"].endswith(f"or {row['idx_to_symbol'][row['neg_target']]}?") for row in prosqa]
    assert np.mean(first) == pytest.approx(0.5, abs=0.07)


def test_prosqa_statistics_against_the_released_rows(prosqa, real_data):
    """Two-sample tests: whole distributions, not only means."""
    ours, theirs = statistics(prosqa), statistics(load_json(real_data / "prosqa" / "valid.json"))
    for key in ours:
        values = sorted({*ours[key], *theirs[key]})
        table = np.array([[Counter(sample[key])[v] for v in values] for sample in (ours, theirs)])
        # Merge rare values at the upper end, as the test asks for.
        rare = table.sum(0) < 10
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)]) if rare.any() else table
        assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3, key


@pytest.mark.parametrize("encoding", ["facts", "text"])
def test_asking_about_the_other_root_turns_the_answer_round(encoding):
    """The two leaves stand alike below the two roots, so only the root that is asked about decides."""
    asked = []
    for row in balanced_rows(300, "dev", encoding=encoding, depth=3, family_size=6):
        g = graph(row)
        roots = [v for v in g if g.in_degree(v) == 0]
        assert len(g) == 13
        assert len(roots) == 2
        (other,) = set(roots) - {row["root"]}
        for root, leaf in ((row["root"], row["target"]), (other, row["neg_target"])):
            assert nx.shortest_path_length(g, root, leaf) == 3
            assert g.out_degree(leaf) == 0
            assert g.out_degree(root) >= 2
        assert not nx.has_path(g, row["root"], row["neg_target"])
        assert not nx.has_path(g, other, row["target"])
        shared = nx.descendants(g, row["root"]) & nx.descendants(g, other)
        assert len(shared) == 1  # the sink
        assert g.number_of_edges() == 14
        assert len(row["steps"]) == 3
        asked.append(row["root"] == min(roots))
    assert stats.binomtest(sum(asked), len(asked)).pvalue > 1e-4


def test_balanced_text(balanced):
    for row in balanced_rows(200, "train", encoding="text"):
        check_question_text(row)


def test_balanced_facts(balanced):
    firsts = []
    for row in balanced[:300]:
        name, words = row["idx_to_symbol"], row["question"].split()
        facts, (mark, root, *options) = words[:-4], words[-4:]
        assert mark == "?"
        assert root == name[row["root"]]
        assert sorted(options) == sorted([name[row["target"]], name[row["neg_target"]]])
        assert Counter(facts) == Counter(f"{name[a]}>{name[b]}" for a, b in row["edges"])
        assert set(name) == {f"n{i}" for i in range(13)}
        path = [root, *row["steps"]]
        assert all(f"{a}>{b}" in facts for a, b in pairwise(path))
        assert row["answer"] == path[-1] == name[row["target"]]
        firsts.append(options[0] == row["answer"])
    assert stats.binomtest(sum(firsts), len(firsts)).pvalue > 1e-4
    more = balanced_rows(100, "train", n_names=20)
    assert set().union(*(row["idx_to_symbol"] for row in more)) == {f"n{i}" for i in range(20)}
    order = [row["question"].split().index(f"{row['idx_to_symbol'][0]}>{row['idx_to_symbol'][1]}") for row in balanced]
    assert len(set(order)) > 10  # the facts come in random order


def shape_features(row: dict) -> np.ndarray:
    """Graph statistics of the first option minus those of the second; nothing about who is asked about."""
    g = graph(row)
    name = row["idx_to_symbol"]
    options = re.findall(r"n\d+$|\w+", row["question"].replace(" or ", " "))[-2:]

    def features(v: int) -> list[float]:
        parents, above = list(g.predecessors(v)), nx.ancestors(g, v)
        depth = nx.shortest_path_length(g, target=v)
        return [
            len(parents),
            len(above),
            np.mean([g.in_degree(p) for p in parents]),
            np.mean([g.out_degree(p) for p in parents]),
            max(depth.values()),
            sum(g.in_degree(u) == 0 for u in above),
            np.mean([g.out_degree(u) for u in above]),
        ]

    return np.subtract(*(features(name.index(option)) for option in options))


def blind_accuracy(rows: list[dict]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.array([shape_features(row) for row in rows])
    option = re.compile(r"(\w+)(?: or)? \w+\??$")
    labels = [option.search(row["question"])[1] == row["idx_to_symbol"][row["target"]] for row in rows]
    return cross_val_score(make_pipeline(StandardScaler(), LogisticRegression()), features, labels, cv=5).mean()


def test_graph_shape_gives_the_answer_away_in_prosqa_and_not_in_the_balanced_variant(prosqa, balanced):
    assert blind_accuracy(prosqa) > 0.75
    assert blind_accuracy(balanced) == pytest.approx(0.5, abs=4 * 0.5 / len(balanced) ** 0.5)


def test_graph_shape_gives_the_answer_away_in_the_released_rows(real_data):
    assert blind_accuracy(load_json(real_data / "prosqa" / "valid.json")) > 0.75


def graph_keys(rows: list[dict]) -> set[str]:
    return {canonical(row["idx_to_symbol"], [tuple(edge) for edge in row["edges"]]) for row in rows}


@pytest.mark.parametrize("make", [prosqa_rows, balanced_rows, lambda *a: balanced_rows(*a, encoding="text")])
def test_splits_share_no_graph(make):
    keys = {split: graph_keys(make(150, split) + make(150, split, 1)) for split in SPLITS}
    assert all(len(found) == 300 for found in keys.values())
    assert not keys["train"] & keys["dev"]
    assert not keys["train"] & keys["test"]
    assert not keys["dev"] & keys["test"]


def test_the_split_depends_on_the_named_graph_alone():
    """Few graphs and names: the same ones come up again and again, yet never in two splits."""
    small = {"depth": 2, "family_size": 4, "n_names": 9, "n_edges": 9}
    keys = {split: graph_keys(balanced_rows(300, split, **small)) for split in SPLITS}
    assert not keys["train"] & keys["test"]
    assert not keys["dev"] & keys["test"]
    row = balanced_rows(1, "train")[0]
    shuffled = {**row, "edges": row["edges"][::-1]}
    assert graph_keys([row]) == graph_keys([shuffled])


@pytest.mark.parametrize("make", [prosqa_rows, balanced_rows, prontoqa_rows])
def test_rows_are_deterministic(make):
    assert make(5, "train", 7) == make(5, "train", 7)
    assert make(5, "train", 7) == make(9, "train", 7)[:5]
    assert make(5, "train", 7) != make(5, "train", 8)
    with pytest.raises(UserError, match="unknown split 'val'; valid: train, dev, test"):
        make(5, "val")


def test_larger_balanced_graphs():
    for row in balanced_rows(20, "test", encoding="text", depth=5, family_size=11, n_edges=27):
        assert len(row["idx_to_symbol"]) == 23
        assert len(row["steps"]) == 5
        assert len(row["edges"]) == 27


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"encoding": "words"}, "encoding must be text or facts, got 'words'"),
        ({"depth": 1}, "got depth 1 and family_size 6"),
        ({"depth": 5}, "got depth 5 and family_size 6"),
        ({"n_edges": 11}, "have 12 to 20 edges, n_edges is 11"),
        ({"n_edges": 21}, "have 12 to 20 edges, n_edges is 21"),
        ({"n_names": 12}, "12 names for 13 nodes; lower family_size or raise n_names"),
        ({"encoding": "text", "family_size": 21, "n_edges": 60}, "42 names for 43 nodes; lower family_size"),
    ],
)
def test_impossible_balanced_sizes(sizes, message):
    with pytest.raises(UserError, match=message):
        balanced_rows(1, "train", **sizes)


# ---- ProntoQA -----------------------------------------------------------------------------------------------------


def closure(facts: list[str], person: str) -> set[str]:
    """Everything that follows about `person`, by applying all rules until nothing new comes."""
    known = {fact.removeprefix(f"{person} is ") for fact in facts if fact.startswith(f"{person} is ")}
    while True:
        new = {
            what
            for fact in facts
            for concept, what in re.findall(r"^Every (\w+) is (.*)$", fact)
            if f"a {concept}" in known
        }
        if new <= known:
            return known
        known |= new


def test_prontoqa_answers_follow_from_the_facts():
    rows = prontoqa_rows(300, "train")
    for row in rows:
        text, person, claim = re.fullmatch(r"(.*)\. True or false: (\w+) is (.*)\.", row["question"]).groups()
        facts = text.split(". ")
        known = closure(facts, person)
        opposite = claim.removeprefix("not ") if claim.startswith("not ") else f"not {claim}"
        assert (claim in known) != (opposite in known)
        assert row["answer"] == str(claim in known)
        people = {fact.split()[0] for fact in facts} - {"Every"}
        (other,) = people - {person}
        assert (claim in closure(facts, other)) != (claim in known)  # the other person turns it round
        for found in (known, closure(facts, other)):
            assert not any(f"not {what}" in found for what in found)

        assert len(row["steps"]) == 6
        said = [sentence.rstrip(".") for step in row["steps"] for sentence in re.findall(r"[^.]+\.", step)]
        assert all(s.strip() in facts or s.strip().removeprefix(f"{person} is ") in known for s in said)
        assert row["steps"][-1] in (f"{person} is {claim}.", f"{person} is {opposite}.")
    for column in (
        [row["answer"] == "True" for row in rows],
        [" is not " in row["question"].rpartition(":")[2] for row in rows],
        [(row["answer"] == "True") == (" is not " in row["question"].rpartition(":")[2]) for row in rows],
    ):
        assert stats.binomtest(sum(column), len(rows)).pvalue > 1e-4


def test_prontoqa_splits_and_sizes():
    facts = {
        split: {frozenset(row["question"].partition(" True or")[0].split(". ")) for row in prontoqa_rows(300, split)}
        for split in SPLITS
    }
    assert not facts["train"] & facts["test"]
    assert not facts["train"] & facts["dev"]
    assert [len(row["steps"]) for row in prontoqa_rows(3, "train", hops=2)] == [3, 3, 3]
    for hops in (0, 11):
        with pytest.raises(UserError, match=rf"hops must be 1\.\.10, got {hops}"):
            prontoqa_rows(1, "train", hops=hops)


def test_word_lists():
    assert len(set(CONCEPTS)) == len(CONCEPTS) == 40
    assert len(set(PEOPLE)) == len(PEOPLE) == 20
    assert not set(CONCEPTS) & set(PEOPLE)


# ---- tokenizers ---------------------------------------------------------------------------------------------------


def texts(rows: list[dict]) -> list[str]:
    return [text for row in rows for text in (row["question"], *row["steps"], row["answer"], f"### {row['answer']}")]


@pytest.mark.parametrize(
    "make",
    [
        lambda: prosqa_rows(50, "train"),
        lambda: prontoqa_rows(50, "train"),
        lambda: balanced_rows(50, "train", encoding="text"),
        lambda: arith_rows(200, "train", modulus=11),
        lambda: arith_rows(200, "train"),
    ],
)
def test_words_survive_the_round_trip(make):
    rows = make()
    tokenizer = word_tokenizer(rows)
    for text in texts(rows):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    row = rows[0]
    lines = [row["question"], *row["steps"], f"### {row['answer']}"]
    assert tokenizer.decode(tokenizer.encode("\n".join(lines))) == " ".join(lines)


def test_words_are_single_tokens():
    tokenizer = word_tokenizer(arith_rows(50, "train", modulus=11))
    assert tokenizer.tokenize("<<10+9=8>> ### 8") == ["<<", "10", "+", "9", "=", "8", ">>", "###", "8"]
    tokenizer = word_tokenizer([], VOCABULARY)
    tokens = tokenizer.tokenize("Every blix is a dwung.\nIs Ada a blix or dwung?")
    assert " ".join(tokens) == "Every blix is a dwung . Is Ada a blix or dwung ?"
    assert "<<" not in tokenizer.get_vocab()


def test_special_tokens(tmp_path):
    from transformers import AutoTokenizer

    for made in (word_tokenizer([], VOCABULARY), facts_tokenizer()):
        made.save_pretrained(tmp_path)
        for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
            assert tuple(tokenizer.convert_ids_to_tokens(range(6))) == SPECIAL_TOKENS
            assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
            ids = tokenizer.encode("?<bot><latent><latent> <eot>?<pause><eos>")
            tokens = " ".join(tokenizer.convert_ids_to_tokens(ids))
            assert tokens == "? <bot> <latent> <latent> <eot> ? <pause> <eos>"
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "??"


def test_the_vocabulary_covers_every_text_row():
    tokenizer = word_tokenizer([], VOCABULARY)
    for row in prosqa_rows(60, "test") + prontoqa_rows(60, "test") + balanced_rows(60, "test", encoding="text"):
        for text in texts([row]):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_facts_are_single_tokens_with_a_table(balanced):
    tokenizer = facts_tokenizer()
    for text in texts(balanced[:100]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) == len(text.split())
    table = fact_table(tokenizer)
    assert table.shape == (len(tokenizer), 2)
    assert (table[:, 0] >= 0).sum() == 13 * 12
    for token, i in tokenizer.get_vocab().items():
        pair = re.fullmatch(r"(n\d+)>(n\d+)", token)
        expected = tokenizer.convert_tokens_to_ids(list(pair.groups())) if pair else [-1, -1]
        assert table[i].tolist() == expected


# ---- files --------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path, prosqa):
    save_json(tmp_path / "rows.json", prosqa[:5])
    assert load_json(tmp_path / "rows.json") == prosqa[:5]
    assert json.loads((tmp_path / "rows.json").read_text()) == prosqa[:5]


def test_released_file(real_data):
    rows = load_json(real_data / "prosqa" / "valid.json")
    assert len(rows) == 300
    for row in rows:
        path = [row["root"]]
        for step in row["steps"]:
            source, destination = re.fullmatch(r"(?:Every )?(\w+) is a (\w+)\.", step).groups()
            assert row["idx_to_symbol"][path[-1]] == source
            path.append(row["idx_to_symbol"].index(destination))
        assert path[-1] == row["target"]
    tokenizer = word_tokenizer(rows)
    for text in texts(rows[:50]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


GOOD = {"question": "Ada is a blix. Is Ada a blix or dwung?", "steps": ["Ada is a blix."], "answer": "Ada is a blix."}
GRAPH = {"idx_to_symbol": ["Ada", "blix", "dwung"], "edges": [[0, 1]], "root": 0, "target": 1, "neg_target": 2}


def changed(**changes) -> dict:
    row = copy.deepcopy({**GOOD, **GRAPH})
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Ada is a blix.", "expected an object with question, steps and answer, found str"),
        ({}, "no key 'question'; it has none"),
        ({"question": "q", "answer": "a"}, "no key 'steps'; it has 'question', 'answer'"),
        ({"question": "q", "steps": ["s"]}, "no key 'answer'"),
        (changed(question=5), "key 'question' must be a non-empty string, found int"),
        (changed(question=" "), "key 'question' must be a non-empty string"),
        (changed(answer=["a"]), "key 'answer' must be a non-empty string, found list"),
        (changed(answer=""), "key 'answer' must be a non-empty string, found an empty str"),
        (changed(steps=[]), "key 'steps' must be a non-empty list of strings, found an empty list; write out"),
        (changed(steps="s"), "key 'steps' must be a non-empty list of strings, found str"),
        (changed(steps=["s", None]), r"steps\[1\] must be a non-empty string, found NoneType"),
        (changed(steps=["s", ""]), r"steps\[1\] must be a non-empty string, found an empty str"),
        (changed(edges=...), "no key 'edges'; a row with a graph has all of idx_to_symbol, edges, root"),
        (changed(idx_to_symbol=["Ada", 1, "dwung"]), "key 'idx_to_symbol' must be a list of names"),
        (changed(edges={}), "key 'edges' must be a list of .*, found an empty dict"),
        (changed(edges=[[0, 1], [1, 3]]), r"edges\[1\] must be two nodes 0\.\.2, found \[1, 3\]"),
        (changed(edges=[[0, 1, 2]]), r"edges\[0\] must be two nodes 0\.\.2, found \[0, 1, 2\]"),
        (changed(edges=[5]), r"edges\[0\] must be two nodes 0\.\.2, found 5"),
        (changed(target="blix"), r"key 'target' must be a node 0\.\.2, found 'blix'"),
        (changed(root=True), r"key 'root' must be a node 0\.\.2, found True"),
        (changed(neg_target=-1), r"key 'neg_target' must be a node 0\.\.2, found -1"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, {**GOOD, **GRAPH}, row]))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: row 2: {message}"):
        load_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('[{"question": "q", "ste', "not valid JSON .* was it cut short"),
        ("{}", "expected a non-empty JSON list of rows, found an empty dict"),
        ("[]", "expected a non-empty JSON list of rows, found an empty list"),
        ('"rows"', "expected a non-empty JSON list of rows, found str"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {message}"):
        load_json(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        load_json(tmp_path / "gone.json")
    (tmp_path / "rows.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(UserError, match=r"rows\.json: not valid JSON"):
        load_json(tmp_path / "rows.json")
