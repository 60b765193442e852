import json

import numpy as np
import pytest

from papers.divpo.plot import draw, smooth
from shared.experiments import files
from shared.experiments.paper import load_paper


def make_runs(path, arms, rng):
    """Finished runs of two seeds with made-up numbers."""
    paper = load_paper("divpo")
    for arm in arms:
        config = {"temperatures": [], "samples_per_prompt": 4, **paper.arms[arm].config}
        names = ["valid", "unique"] if arm.startswith("persona") else ["reward", "unique"]
        for seed in (0, 1):
            run = path / arm / str(seed)
            metrics = {
                f"{name}{suffix}": float(rng.random())
                for name in names
                for suffix in ("", *(f"_t{t:g}" for t in config["temperatures"]))
            }
            if arm.startswith("persona"):
                texts = [json.dumps({"first_name": str(rng.integers(5))}) for _ in range(20)] + ["junk"]
                rows = [{"item": f"sample-{i}", "output": text, "scores": {}} for i, text in enumerate(texts)]
            else:
                outputs = [" ".join(rng.choice(list("abcdef"), 5)) for _ in range(4)]
                rows = [{"item": f"t{i}", "outputs": outputs, "scores": {"reward": 0.5}} for i in range(2)]
            log = [
                {"stage": "train", "step": s, "total": 5, "rollout/reward": 0.5, "rollout/unique": 0.3}
                for s in range(1, 6)
            ]
            if seed == 1:
                del log[0]["rollout/unique"]  # too few valid samples at that step
            files.write_jsonl(run / "predictions.jsonl", rows)
            files.write_jsonl(run / "log.jsonl", [*log, {"stage": "eval", "step": 1, "total": 1}])
            files.write_json(run / "eval.json", {"metrics": metrics, "config": config})
    files.write_json(path / "runs.json", [[arm, seed] for arm in arms for seed in (0, 1)])


@pytest.mark.parametrize("scale", ["tiny", "gpu", "paper"])
def test_every_figure_that_the_paper_file_names_is_drawn(scale, tmp_path):
    paper = load_paper("divpo")
    make_runs(tmp_path / "runs", paper.select_arms(scale), np.random.default_rng(0))
    draw(tmp_path / "runs", tmp_path / "figures")
    expected = {figure.file for figure in paper.figures if scale in figure.scales}
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == expected


@pytest.mark.parametrize("arms", [["persona_base"], ["keywords_dpo"], ["persona_divpo", "keywords_base"]])
def test_arms_that_were_not_run_are_left_out(arms, tmp_path):
    make_runs(tmp_path / "runs", arms, np.random.default_rng(0))
    draw(tmp_path / "runs", tmp_path / "figures")
    assert list((tmp_path / "figures").glob("*.png"))


def test_smoothing_keeps_constants_and_means():
    assert smooth(np.ones((2, 20))) == pytest.approx(np.ones((2, 20)))
    line = np.arange(20.0)[None]
    assert smooth(line)[0, 4:-4] == pytest.approx(line[0, 4:-4])
    assert smooth(np.arange(3.0)[None]).shape == (1, 3)
