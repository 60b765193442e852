import json

import pytest

from shared.experiments.errors import UserError
from shared.experiments.results import read_results, write_results


def test_means_claims_and_costs_are_collected(small_paper, small_runs, run_info):
    results = write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)

    assert json.loads((small_runs / "results.json").read_text()) == results
    assert read_results(small_runs / "results.json") == results
    accuracy = results["arms"]["ours"]["metrics"]["accuracy"]
    assert accuracy["per_seed"] == {"0": 0.9, "1": 0.8, "2": 0.9}
    assert accuracy["mean"] == pytest.approx(2.6 / 3)
    assert accuracy["lo"] < accuracy["mean"] < accuracy["hi"]
    assert accuracy["items"] == 10
    assert results["arms"]["ours"]["metrics"]["seconds"]["items"] is None
    assert results["arms"]["ours"]["runs"]["1"]["train"]["key"] == "train-ours-1"
    assert [c["verdict"] for c in results["claims"]] == ["reproduced", "not reproduced", "not testable here"]
    assert results["info"] == run_info
    assert results["missing"] == []
    assert results["figures"] == [
        {"file": "accuracy", "shows": "Accuracy by arm", "paper": "Figure 3", "drawn": True},
        {"file": "curves", "shows": "Loss", "paper": None, "drawn": False},
    ]


def test_equal_runs_give_equal_files(small_paper, small_runs, run_info):
    write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)
    first = (small_runs / "results.json").read_bytes()
    write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)
    assert (small_runs / "results.json").read_bytes() == first


def test_smoke_claims_nothing(small_paper, small_runs, run_info):
    results = write_results(small_paper, "smoke", small_runs, [0], ["ours", "base"], run_info)
    assert results["claims"] == []
    assert "claims nothing" in results["claims_note"]


def test_a_missing_run_is_named_and_its_claims_are_not_judged(small_paper, small_runs, run_info):
    (small_runs / "base/1/eval.json").unlink()
    results = write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)
    assert results["missing"] == [{"arm": "base", "seed": 1, "reason": "no eval.json"}]
    assert results["claims"][0]["verdict"] == "not testable here"
    assert results["claims"][0]["reason"] == "no results for base seed 1 (no eval.json)"
    assert results["claims"][1]["verdict"] == "not reproduced"  # needs `ours` only
    assert list(results["arms"]["base"]["metrics"]["accuracy"]["per_seed"]) == ["0", "2"]


def test_a_run_that_failed_again_does_not_live_on_in_its_old_results(small_paper, small_runs, run_info):
    failed = run_info | {"failed": {"base/1": "out of memory"}}
    results = write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], failed)
    assert results["missing"] == [{"arm": "base", "seed": 1, "reason": "out of memory"}]


def test_an_arm_without_any_run_still_has_its_row(small_paper, small_runs, run_info):
    results = write_results(small_paper, "tiny", small_runs, [7], ["ours"], run_info)
    assert results["arms"]["ours"] == {"title": "Ours", "runs": {}, "metrics": {}}
    assert results["missing"] == [{"arm": "ours", "seed": 7, "reason": "no train.json"}]


def predictions(small_runs, lines):
    (small_runs / "ours/0/predictions.jsonl").write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"item": 1, "scores": {"accuracy": NaN}}'], r"ours/0/predictions.jsonl:1: scores.accuracy: nan is not"),
        (['{"item": 1, "scores": {"accuracy": "yes"}}'], r"predictions.jsonl:1: scores.accuracy: 'yes' is not"),
        (['{"item": 1, "scores": {"accuracy": 1}}'] * 2, r"predictions.jsonl:2: item '1' already has a score"),
        (['{"scores": {"accuracy": 1}}'], r'predictions.jsonl:1: a row needs "item"'),
        (['{"item": 1, "score": 1}'], r'predictions.jsonl:1: a row needs "item" and "scores"'),
        (['{"item": 1, "scores": {"accuracy": 0}}'], r"metrics.accuracy is 0.9 but the mean .* is 0"),
        (['{"item": 1, "scores": {"accuracy": 0.9}}'], r"arm ours, accuracy: .* in some seeds only"),
    ],
)
def test_broken_predictions_are_explained(small_paper, small_runs, run_info, lines, message):
    predictions(small_runs, lines)
    with pytest.raises(UserError, match=message):
        write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)
    assert not (small_runs / "results.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metrics": {"loss": Infinity}}', r"eval.json: metrics.loss: inf is not a finite number"),
        ('{"metrics": {"loss": null}}', r"eval.json: metrics.loss: None is not a finite number"),
        ('{"loss": 1}', r"eval.json: no `metrics`"),
        ('{"metrics": {"lo', r"eval.json: not valid JSON"),
    ],
)
def test_a_broken_eval_json_is_explained(small_paper, small_runs, run_info, text, message):
    (small_runs / "ours/0/eval.json").write_text(text)
    with pytest.raises(UserError, match=message):
        write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)


def test_results_of_another_schema_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema_version 99, expected 1"):
        read_results(tmp_path / "results.json")
