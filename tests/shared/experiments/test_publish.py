"""`make publish` and `make report` on a repository with one paper, called the way a person does."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.experiments.errors import UserError
from shared.experiments.publish import check_index, index_table, parts_table, write_index

MARKERS = "<!-- papers:begin -->\n<!-- papers:end -->\n<!-- shared:begin -->\n<!-- shared:end -->"
SCRIPT = Path(__file__).parents[3] / "scripts" / "report.py"


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Where the first test leaves its repository for the others to copy: running the toy takes seconds."""
    return tmp_path_factory.mktemp("stock") / "repo"


@pytest.fixture
def toy_repo(repo, stock):
    """With one arm, a commit, a papers/README.md, and `tiny` reproduced."""
    if stock.exists():
        shutil.rmtree(repo.root)
        shutil.copytree(stock, repo.root)
        return repo
    shutil.copy(SCRIPT, repo.root / "scripts")
    paper = repo.toy / "paper.yaml"
    text = paper.read_text().replace("b: {arm: slow, metric: accuracy}", "constant: 0.5")
    paper.write_text("\n".join(line for line in text.splitlines() if not line.startswith("  slow:")))
    (repo.root / "papers/README.md").write_text(f"# Papers\n\n{MARKERS}\n\nText.\n")
    (repo.root / ".gitignore").write_text("runs\nreport\n__pycache__\n")
    git(repo, "init", "-q")
    commit(repo)
    status, output = repo.reproduce(PAPER="toy", JOBS="2")
    assert status == 0, output
    shutil.copytree(repo.root, stock)
    return repo


def git(repo, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=repo.root, check=True)


def commit(repo):
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "change")


def publish(repo, **variables):
    return repo.call("scripts/report.py", "--publish", **{"PAPER": "toy", **variables})


def test_finished_runs_are_published_and_shown(toy_repo):
    status, output = publish(toy_repo)
    assert status == 0, output
    target = toy_repo.toy / "results/tiny"
    assert sorted(path.name for path in target.iterdir()) == ["loss.png", "results.json"]
    results = json.loads((target / "results.json").read_text())
    assert [claim["verdict"] for claim in results["claims"]] == ["reproduced"]
    assert results["missing"] == []
    readme = (toy_repo.root / "papers/README.md").read_text()
    assert "| A quadratic. | 1 reproduced | – | – |" in readme
    assert readme.startswith("# Papers\n")
    assert readme.endswith("\n\nText.\n")

    shutil.rmtree(toy_repo.root / "runs")
    status, output = toy_repo.call("scripts/report.py")
    assert status == 0, output
    index = (toy_repo.root / "report/index.html").read_text()
    assert "toy-tiny.html#faster" in index
    assert (toy_repo.root / "report/toy-tiny.html").is_file()


def test_a_broken_paper_is_named_and_the_others_are_reported(toy_repo):
    broken = toy_repo.root / "papers/broken/paper.yaml"
    broken.parent.mkdir()
    broken.write_text("name: broken\nseeds: 3\n")
    readme = (toy_repo.root / "papers/README.md").read_text()
    status, output = toy_repo.call("scripts/report.py")
    assert status == 2, output
    assert "papers/broken/paper.yaml: title: Field required" in output
    assert "papers/broken/paper.yaml: seeds: Input should be a valid dictionary" in output
    assert (toy_repo.root / "report/toy-tiny.html").is_file()
    assert (toy_repo.root / "papers/README.md").read_text() == readme


@pytest.mark.slow
def test_what_cannot_be_made_again_is_not_published(toy_repo):
    def refused(**variables):
        status, output = publish(toy_repo, **variables)
        assert status == 2, output
        assert "Traceback" not in output
        assert not (toy_repo.toy / "results").exists()
        return output

    method = toy_repo.toy / "method.py"
    method.write_text(method.read_text().replace("0.01", "0.02"))
    output = refused()
    assert "papers/toy/method.py: not committed" in output
    assert "fast seed 0, train: made from other code or config" in output
    git(toy_repo, "checkout", "-q", "papers/toy/method.py")

    method.write_text("# A comment changes no result, but the commit would not be what ran.\n" + method.read_text())
    output = refused()
    assert "papers/toy/method.py: not committed" in output
    assert "made from" not in output
    git(toy_repo, "checkout", "-q", "papers/toy/method.py")

    config = toy_repo.toy / "configs/tiny.yaml"
    config.write_text("steps: 21\n")
    commit(toy_repo)
    output = refused()
    assert "fast seed 2, eval: made from other code or config" in output
    assert "not committed" not in output
    config.write_text("steps: 20\n")
    commit(toy_repo)

    assert toy_repo.reproduce(PAPER="toy", SEEDS="0", SET="steps=22")[0] == 0
    assert "fast seed 0, train: made from other code or config" in refused()
    assert "for a part only: make reproduce PAPER=toy SEEDS=0 SET=steps=22" in refused()
    assert toy_repo.reproduce(PAPER="toy")[0] == 0

    (toy_repo.run_dir("fast", 1) / "eval.json").rename(toy_repo.root / "eval.json")
    assert "fast seed 1, eval: not done" in refused()
    (toy_repo.root / "eval.json").rename(toy_repo.run_dir("fast", 1) / "eval.json")

    path = toy_repo.root / "runs/toy/tiny/results.json"
    good = path.read_text()
    path.write_text(good.replace('"missing": []', '"missing": [{"arm": "fast", "seed": 2, "reason": "killed"}]'))
    assert "fast seed 2: killed" in refused()
    path.write_text(good)

    figure = toy_repo.root / "runs/toy/tiny/figures/loss.png"
    figure.write_bytes(b"0" * 300_000)
    assert "loss.png: 300 kB, above 300 kB" in refused()
    figure.unlink()
    assert "loss.png: no such figure" in refused()
    figure.write_bytes(b"")

    assert "unknown scale to publish 'smoke'; valid: tiny, gpu, paper" in refused(SCALE="smoke")
    assert "make reproduce PAPER=toy SCALE=gpu` first" in refused(SCALE="gpu")
    assert "unknown paper 'tyo' (did you mean 'toy'?)" in refused(PAPER="tyo")
    assert "which paper? make publish PAPER=NAME with one of: toy" in refused(PAPER="")

    paper = toy_repo.toy / "paper.yaml"
    paper.write_text(paper.read_text().replace("[0, 1, 2]", "[0, 1]"))
    commit(toy_repo)
    assert "seeds.tiny: 2, at least 3 are needed" in refused()


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_is_checked_against_papers_and_results(repo):
    papers = repo.root / "papers"
    readme = papers / "README.md"
    with pytest.raises(UserError, match=r"README.md: needs the lines <!-- papers:begin --> and"):
        check_index(papers)
    readme.write_text(f"Intro.\n{MARKERS}\n")
    with pytest.raises(UserError, match="out of date"):
        check_index(papers)
    assert write_index(papers)
    check_index(papers)
    assert not write_index(papers)

    yaml = repo.toy / "paper.yaml"
    yaml.write_text(yaml.read_text().replace("A quadratic.", "A | cubic."))
    with pytest.raises(UserError, match="out of date"):
        check_index(papers)
    assert "[toy](toy/)" in index_table(papers)
    assert "A \\| cubic." in index_table(papers)


def test_the_parts_of_shared_that_a_paper_uses(repo):
    """Of the toy's own files, also what functions import; a package without a module of its own gets a tick."""
    (repo.root / "shared/things").mkdir(parents=True)
    for name in ("__init__", "one", "two"):
        (repo.root / f"shared/things/{name}.py").write_text("")
    (repo.root / "shared/bare").mkdir()
    (repo.root / "shared/bare/__init__.py").write_text("value = 1\n")
    method = repo.toy / "method.py"
    lazy = "def lazy():\n    from shared.bare import value\n    import shared.things.two\n    return value\n"
    method.write_text(f"from shared.things.one import x\n{method.read_text()}\n{lazy}")
    assert parts_table(repo.root / "papers").splitlines() == [
        "| paper | bare | things |",
        "|---|---|---|",
        "| toy | ✓ | one, two |",
    ]
