import shutil

import numpy as np
import pytest

from shared.experiments import files
from shared.experiments.paper import load_paper

SETTINGS = {
    "task": "findblock",
    "answer": "first",
    "n_blocks": 8,
    "block_size": 3,
    "context_length": 64,
    "needles": [],
    "needle_contexts": [],
    "needle_depths": [0.0, 1.0],
    "babilong": None,
    "babilong_lengths": ["0k", "4k"],
    "babilong_tasks": ["qa1", "qa3"],
}
LONG = {**SETTINGS, "task": "slimpajama", "needles": [2, 6], "needle_contexts": [64, 128], "babilong": "given"}


def make_runs(path, arms: dict[str, dict]):
    """Finished runs of two seeds with made-up numbers."""
    rng = np.random.default_rng(0)
    for arm, settings in arms.items():
        metric = "error" if settings["task"] == "findblock" else "nll"
        for seed in (0, 1):
            run = path / arm / str(seed)
            items = rng.random(6)
            rows = [{"item": f"i{i}", "scores": {metric: float(x)}} for i, x in enumerate(items)]
            for context in settings["needle_contexts"]:
                for i, n in enumerate(settings["needles"] * 2):
                    name = f"needles-{context}-{n}-{i}"
                    scores = {f"needles_{n}": float(n == 2)}
                    rows.append(
                        {"item": name, "context": context, "n_needles": n, "depth": float(i // 2), "scores": scores}
                    )
            metrics = {metric: float(items.mean()), "perplexity": 3.0 + seed, "parameters": 10**8 * (1 + seed)}
            metrics |= {f"babilong_{task}{n}k": 0.5 - 0.1 * n for task in ("", "qa1_", "qa3_") for n in (0, 4)}
            run.mkdir(parents=True)
            files.write_jsonl(run / "predictions.jsonl", rows)
            files.write_json(run / "eval.json", {"metrics": metrics, "config": settings})
            files.write_json(run / "train.json", {"metrics": {}})
            kernels = {
                "0": {
                    "kq_pre": rng.normal(size=(2, 2, 5)).tolist(),
                    "head_pre": [[1, 0], [0, 1]],
                    "head_post": [[[1.0]], [[2.0]]],
                }
            }
            files.write_json(run / "kernels.json", kernels)
            weights = rng.dirichlet(np.ones(12), size=(2, 2)).tolist()
            attention = {"tokens": ["<bos>", *"abc.def.#da"], "block": [5, 8], "weights": weights}
            files.write_json(run / "attention.json", attention)
            log = [{"stage": "train", "step": step, "total": 3, "loss": 1.0, metric: 0.5} for step in (1, 2, 3)]
            files.write_jsonl(run / "log.jsonl", log)
    files.write_json(path / "runs.json", [[arm, seed] for arm in arms for seed in (0, 1)])


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_every_figure_that_the_paper_file_names_is_drawn(scale, tmp_path):
    from papers.mta.plot import draw

    paper = load_paper("mta")
    text = SETTINGS | {"task": "docs"} if scale == "tiny" else LONG
    arms = {arm: text if arm.startswith("l") and "last" not in arm else SETTINGS for arm in paper.select_arms(scale)}
    make_runs(tmp_path / "runs", arms)
    draw(tmp_path / "runs", tmp_path / "figures")
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    wanted = {figure.file for figure in paper.figures if scale in figure.scales}
    assert drawn == wanted


def test_some_arms_are_enough(tmp_path):
    from papers.mta.plot import draw

    make_runs(tmp_path / "runs", {"first_mta": SETTINGS})
    draw(tmp_path / "runs", tmp_path / "a")
    assert {path.stem for path in (tmp_path / "a").glob("*.png")} == {
        "attention",
        "find_block",
        "find_block_curves",
        "kernels_first_mta",
    }
    shutil.rmtree(tmp_path / "runs")
    make_runs(tmp_path / "runs", {"lm_mta": SETTINGS | {"task": "docs"}})
    draw(tmp_path / "runs", tmp_path / "b")
    assert {path.stem for path in (tmp_path / "b").glob("*.png")} == {"head_mixing", "lm", "kernels_lm_mta"}


def test_errors_of_a_repeated_and_of_one_matched_letter_agree_with_the_task():
    from papers.mta.data import FindBlock, letter_tokenizer
    from papers.mta.plot import one_cue_lines

    lines = one_cue_lines(SETTINGS)
    tokenizer, rng = letter_tokenizer(), np.random.default_rng(0)
    batch = FindBlock(answer="first", block_size=3, n_blocks=8).batch(3000, rng)
    right, repeated = [], []
    for row in batch.input_ids:
        text = "".join(tokenizer.convert_ids_to_tokens(row.tolist())[1:-1])
        blocks, _, query = text.partition("#")
        candidates = [block for block in blocks.split(".") if query[1] in block]
        right.append(sum({query[0], query[1]} <= set(block) for block in candidates) / len(candidates))
        repeated.append(query[2] in query[:2])
    assert 1 - np.mean(right) == pytest.approx(lines["one letter matched"], abs=0.015)
    assert 1 - np.mean(repeated) == pytest.approx(lines["a letter of the query repeated"], abs=0.03)


def test_head_mixers_have_a_diagonal_and_a_rest():
    from papers.mta.plot import diagonal_and_rest

    assert diagonal_and_rest([[2.0, -0.5], [0.1, -4.0]]) == pytest.approx((3.0, 0.3))
    assert diagonal_and_rest([[[2.0, 0.5], [0.1, 4.0]], [[-1.0, 0.0], [0.2, 1.0]]]) == pytest.approx((2.0, 0.2))
    assert diagonal_and_rest([[[2.0]], [[-3.0]]]) == (2.5, 0.0)


def test_needle_accuracy_by_number_and_depth(tmp_path):
    from papers.mta.plot import needle_means

    make_runs(tmp_path, {"lm_mta": LONG})
    assert needle_means(tmp_path / "lm_mta" / "0", 64, "n_needles", [2, 6]) == [1.0, 0.0]
    assert needle_means(tmp_path / "lm_mta" / "0", 64, "depth", [0.0, 1.0]) == [0.5, 0.5]
