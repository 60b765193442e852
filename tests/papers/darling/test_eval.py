"""Scores of samples, and the figures that are drawn from them."""

import json

import numpy as np
import pytest

from papers.darling.config import Config
from papers.darling.eval import by_part, front, front_area, meaning_of, means, score_row
from papers.darling.tasks import IdeasTask, OperatorsTask


@pytest.fixture
def task():
    return OperatorsTask(Config(), seed=0)


ROW = {"prompt": "3 4 5 7", "digits": [3, 4, 5], "answer": "7"}
RIGHT = "so 3 * 4 = 2 then 2 + 5 = 7 ."
WRONG = "so 3 + 4 = 7 then 7 + 5 = 2 ."


def test_scores_of_a_verifiable_prompt(task):
    texts = [RIGHT, RIGHT + " indeed", WRONG, WRONG] + [WRONG.replace("so", "now")] * 6
    scores = score_row(ROW, texts, task, None, meaning_of(Config(), task), ks=[1, 2, 10, 64])
    assert scores["pass@1"] == pytest.approx(0.2)
    assert scores["pass@2"] == pytest.approx(1 - (8 * 7) / (10 * 9))
    assert scores["pass@10"] == 1.0
    assert "pass@64" not in scores  # there are not so many samples
    assert scores["distinct"] == 2.0
    assert scores["remarks"] == pytest.approx(0.1)
    assert scores["distinct4"] == 1.0


def test_distinct_is_the_mean_over_blocks_of_ten(task):
    texts = [RIGHT] * 10 + [WRONG] * 5 + [RIGHT] * 5 + ["cut off"] * 3  # the last block is not whole
    scores = score_row(ROW, texts, task, None, meaning_of(Config(), task), ks=[1])
    assert scores["distinct"] == 1.5


def test_distinct_4_leaves_out_texts_without_4grams(task):
    scores = score_row(ROW, ["so", "so so so so so so"] * 5, task, None, None, ks=[1])
    assert scores["distinct4"] == pytest.approx(1 / 3)
    assert "distinct" not in scores
    assert "distinct4" not in score_row(ROW, [""] * 10, task, None, None, ks=[1])


def test_quality_of_ideas_and_its_parts():
    config = Config(task="ideas")
    task = IdeasTask(config, seed=3)
    rows = task.rows("test")
    text = "quiet once keeper tends lamp"
    records = [{"scores": score_row(row, [text] * 10, task, None, meaning_of(config, task), [1])} for row in rows]
    for row, record in zip(rows, records, strict=True):
        expected = task.world.idea_quality(row["topic"], row["setting"], "guard")
        assert record["scores"] == pytest.approx(
            {"quality": expected, "coherent": 1, "remarks": 0, "distinct": 1, "distinct4": 1}
        )
    parts = {(part, name): value for part, name, value in by_part(records, rows, task)}
    tight = [r["scores"]["quality"] for r, row in zip(records, rows, strict=True) if row["topic"] in task.world.tight]
    assert parts["tight", "quality"] == pytest.approx(np.mean(tight))
    assert {part for part, _ in parts} == {"tight", "wide"}


def test_means_are_over_the_prompts_that_have_the_score():
    assert means([{"scores": {"a": 1.0}}, {"scores": {"a": 2.0, "b": 5.0}}]) == {"a": 1.5, "b": 5.0}


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(10, 1.0)], 1.0),
        ([(1, 1.0)], 0.0),  # one meaning only
        ([(10, 0.0)], 0.0),
        ([(5.5, 0.4)], 0.2),
        ([(5.5, 0.4), (5.0, 0.3)], 0.2),  # dominated
        ([(5.5, 0.4), (1 + 0.9, 1.0)], 0.2 + 0.6 * 0.1),
    ],
)
def test_front_area(points, area):
    assert front_area(points) == pytest.approx(area)
    assert front_area(points[::-1]) == pytest.approx(area)
    # the same by counting points of a fine grid
    x, y = np.meshgrid(np.linspace(1, 10, 901), np.linspace(0, 1, 1001))
    covered = np.any([(x < d) & (y < q) for d, q in points], axis=0)
    assert covered.mean() == pytest.approx(area, abs=0.005)


def test_front():
    metrics = {"quality": 0.0, "distinct": 5.0, "quality_t0.5": 2.0, "distinct_t0.5": 3.0}
    assert front(metrics, [0.5], known=True) == [(5.0, 0.0), (3.0, 2.0)]
    squashed = front(metrics, [0.5], known=False)
    assert squashed[0] == (5.0, 0.5)
    assert squashed[1] == (3.0, pytest.approx(1 / (1 + np.exp(-2))))
    assert front({"pass@1": 0.2, "distinct": 2.0}, [], known=True) == [(2.0, 0.2)]


def test_shortened_texts_keep_their_beginning_and_their_end():
    from papers.darling.plot import shortened

    assert shortened("so  3 * 4\n= 2") == "so 3 * 4 = 2"
    assert shortened("a" * 90) == "a" * 90
    assert shortened("a" * 60 + "b" * 60) == "a" * 43 + " … " + "b" * 43


def test_rewards_of_the_generated_worlds(task):
    reward = task.reward(None)
    columns = {"digits": [[3, 4, 5]] * 2, "answer": ["7"] * 2}
    assert reward(["3 4 5 7"] * 2, [RIGHT, WRONG], **columns, extra=[1, 2]) == [1.0, 0.0]
    ideas = IdeasTask(Config(task="ideas"), 0)
    text = "quiet once keeper tends lamp"
    assert ideas.reward(None)(["harbour fog"], [text]) == [ideas.world.score("harbour fog", text)]


def test_training_and_test_prompts_are_disjoint():
    for task in (OperatorsTask(Config(), 1), IdeasTask(Config(task="ideas"), 1)):
        splits = [{row["prompt"] for row in task.rows(split)} for split in ("train", "dev", "test")]
        assert sum(map(len, splits)) == len(set.union(*splits))
        assert {prompt for prompt, _ in task.traces(500)} <= splits[0]
        assert task.rows("test", 5) == type(task)(Config(task=task_name(task)), 2).rows("test", 5)  # for every seed


def task_name(task):
    return "operators" if isinstance(task, OperatorsTask) else "ideas"


def test_figures(tmp_path):
    """Every figure of the generated worlds from made-up results, and none without runs."""
    from papers.darling.plot import draw
    from shared.experiments.paper import load_paper

    paper = load_paper("darling")
    rng = np.random.default_rng(0)
    pairs = [(arm, seed) for arm in paper.select_arms("tiny") for seed in (0, 1)]
    runs = tmp_path / "runs"
    for arm, seed in pairs:
        directory = runs / arm / str(seed)
        directory.mkdir(parents=True)
        names = [f"pass@{k}" for k in (1, 2, 4, 32)] if arm.startswith("ops") else ["quality"]
        main = names[0]
        names += ["distinct", "remarks"] + [f"{name}_t{t}" for name in (main, "distinct") for t in (0.5, 1.4)]
        items = [{"item": f"i{i}", "scores": {name: float(rng.random()) for name in names}} for i in range(4)]
        metrics = {name: float(np.mean([row["scores"][name] for row in items])) for name in names}
        for prefix in ("", "ngram_", "untrained_"):
            for name in ("balanced_accuracy", "tpr", "fpr"):
                metrics[f"classifier_{prefix}{name}"] = float(rng.random())
        record = {"key": "k", "metrics": metrics, "config": {"sweep": [0.5, 1.4], "eval_temperature": 1.0}}
        record |= {"seconds": 1.0, "cpu_seconds": 1.0, "peak_memory_mb": 1.0, "seed": seed, "arm": arm}
        for stage in ("train", "eval"):
            (directory / f"{stage}.json").write_text(json.dumps(record))
        texts = {"prompt": "3 4 $5 7", "outputs": ["so $3 _ 4", "x " * 200] * 4}  # not for matplotlib to set
        (directory / "predictions.jsonl").write_text("".join(json.dumps(row | texts) + "\n" for row in items))
        log = [{"step": s, "quality": 0.1 * s, "entropy": 1.0} for s in range(12)] if "base" not in arm else []
        (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (runs / "runs.json").write_text(json.dumps(pairs))
    draw(runs, tmp_path / "figures")
    expected = {figure.file for figure in paper.figures if "tiny" in figure.scales}
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == expected

    (runs / "runs.json").write_text("[]")
    draw(runs, tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.png"))
