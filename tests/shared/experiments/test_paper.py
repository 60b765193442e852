"""The schema of paper.yaml: what is wrong is said with file, key and what is allowed."""

import pytest
import yaml

from shared.experiments.errors import UserError
from shared.experiments.paper import load_paper, paper_names


def test_a_valid_file_is_read(repo):
    paper = load_paper("toy", repo.root / "papers")
    assert list(paper.arms) == ["fast", "slow"]
    assert paper.claims[0].tests[0].a.arm == "fast"
    assert paper.root == repo.root
    assert paper.runs("tiny") == repo.root / "runs" / "toy" / "tiny"
    assert paper.scales() == ["smoke", "tiny"]
    assert paper_names(repo.root / "papers") == ["toy"]


@pytest.mark.parametrize(
    ("change", "key", "also"),
    [
        (lambda v: v.update(colour="red"), "colour: unknown key", "arms, figures, claims"),
        (lambda v: v["arms"]["fast"].update(colour=1), "arms.fast.colour: unknown key", "title, about, config, scales"),
        (lambda v: v["claims"][0]["tests"][0]["a"].update(x=1), "claims.0.tests.0.a.x: unknown", "arm, metric"),
        (lambda v: v["claims"][0]["tests"][0]["b"].update(x=1), "claims.0.tests.0.b.x: unknown", "arm, metric"),
        (lambda v: v["claims"][0]["tests"][0].update(x=1), "claims.0.tests.0.x: unknown", "direction, margin"),
        (lambda v: v["figures"][0].update(x=1), "figures.0.x: unknown", "file, shows, paper, scales"),
        (lambda v: v.pop("title"), "title: Field required", ""),
        (lambda v: v.update(name="other"), "name: 'other' must be the directory's name, 'toy'", ""),
        (lambda v: v["claims"][0]["tests"][0].update(direction="up"), "direction", "'greater', 'less' or 'equal'"),
        (lambda v: v["claims"][0]["tests"][0].update(constant=1.0), "claims.0.tests.0", "exactly one of `b`"),
        (lambda v: v["claims"][0]["tests"][0].update(direction="equal", margin=0), "claims.0.tests.0", "above 0"),
        (lambda v: v["claims"][0]["tests"][0]["a"].update(arm="fst"), "claim faster: unknown arm 'fst'", "'fast'"),
        (lambda v: v["claims"][0].update(scales=["tiny", "gpu"]), "claims.0", "gpu stands in both"),
        (lambda v: v["claims"][0].update(not_testable={"gpu": "toy"}), "claims.0", "paper stands in neither"),
        (lambda v: v["claims"][0].update(tests=[]), "claims.0", "`tests` is empty"),
        (lambda v: v["claims"].append(v["claims"][0]), "claims: ids must differ", "faster"),
        (lambda v: v["arms"]["fast"].update(scales=["gpu"]), "claim faster: arm 'fast' does not run at", "tiny"),
        (lambda v: v["arms"].update({"a b": {"title": "A"}}), "arms.a b", "pattern"),
        (lambda v: v.update(arms={}), "arms", "at least 1"),
        (lambda v: v["seeds"].pop("gpu"), "paper.yaml: seeds: give a list of different seeds", "gpu: []"),
        (lambda v: v["seeds"].update(tiny=[1, 1]), "paper.yaml: seeds: give a list of different", "tiny: [1, 1]"),
        (lambda v: v["seeds"].update(tiny=[-1]), "seeds.tiny.0", "greater than or equal to 0"),
        (lambda v: v["seeds"].update(huge=[1]), "seeds.huge", "'tiny', 'gpu' or 'paper'"),
    ],
)
def test_a_wrong_file_is_explained(repo, change, key, also):
    path = repo.toy / "paper.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError) as caught:
        load_paper("toy", repo.root / "papers")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert key in message
    assert also in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [("name: [", "not valid YAML"), ("- 1\n", "expected a mapping"), ("name: a\nname: b\n", "duplicate key name")],
)
def test_a_file_that_is_no_mapping_is_explained(repo, text, reason):
    path = repo.toy / "paper.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        load_paper("toy", repo.root / "papers")
    assert str(path) in str(caught.value)


def test_an_unknown_paper_names_the_nearest(repo):
    with pytest.raises(UserError, match=r"unknown paper 'toi' .did you mean 'toy'.*valid: toy"):
        load_paper("toi", repo.root / "papers")


def test_arms_are_selected_by_pattern_in_the_papers_order(repo):
    paper = load_paper("toy", repo.root / "papers")
    assert paper.select_arms("tiny") == ["fast", "slow"]
    assert paper.select_arms("tiny", ["s*", "fast"]) == ["fast", "slow"]
    assert paper.select_arms("smoke", ["?low"]) == ["slow"]
    with pytest.raises(UserError, match=r"unknown arm at scale tiny 'fats' .did you mean 'fast'.*valid: fast, slow"):
        paper.select_arms("tiny", ["fats"])


def test_layers_lie_in_order_and_sections_are_checked(repo):
    config = repo.toy / "configs" / "tiny.yaml"
    paper = load_paper("toy", repo.root / "papers")
    config.write_text("steps: 9\nrun: {threads: 1}\narms: {slow: {steps: 30}}\n")
    run, layers = paper.layers("tiny", "slow")
    assert run == {"threads": 1}
    assert [values for _, values in layers] == [{"steps": 9}, {"lr": 0.02}, {"steps": 30}]
    file = "papers/toy/configs/tiny.yaml"
    assert [where for where, _ in layers] == [file, "paper.yaml, arm slow", f"{file}, arm slow"]
    config.write_text("arms: {slw: {steps: 30}}\n")
    with pytest.raises(UserError, match=r"papers/toy/configs/tiny.yaml: arms: unknown arm 'slw'.*'slow'"):
        paper.layers("tiny", "slow")
    config.write_text("run: fast\n")
    with pytest.raises(UserError, match=r"configs/tiny.yaml: run: expected a mapping, found 'fast'"):
        paper.layers("tiny", "slow")
