import os
import shutil

import pytest

from shared.experiments import keys
from shared.experiments.errors import UserError
from shared.experiments.keys import code_files, stage_key


@pytest.fixture
def key(repo):
    return lambda config=None, inputs=(), script="train.py": stage_key(
        repo.toy / script, config or {"lr": 0.1}, inputs, repo.root
    )


def edit(path, text):
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 1, before + 1))  # a file system's clock may be coarse


def test_config_inputs_and_script_count(key):
    keys = [key(), key({"lr": 0.2}), key(inputs=["a"]), key(inputs=["b"]), key(script="eval.py")]
    assert len(set(keys)) == len(keys)
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


def test_a_change_in_an_imported_module_counts_and_elsewhere_does_not(repo, key):
    before, evaluation = key(), key(script="eval.py")
    edit(repo.toy / "unrelated.py", "x = 1\n")
    edit(repo.toy / "README.md", "words\n")
    assert key() == before
    edit(repo.toy / "method.py", "def gradient(w, noise):\n    return w\n")
    assert key() != before
    assert key(script="eval.py") == evaluation


def test_remembered_code_is_not_read_again(repo, key, monkeypatch):
    keys._meaning.cache_clear()
    keys.remember(repo.toy / "train.py", repo.root)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail(f"{path} is read"))
    found = key()
    monkeypatch.undo()
    keys._meaning.cache_clear()
    assert found == key()
    edit(repo.toy / "method.py", "def gradient(w, noise):\n    return w\n")
    assert found != key()


def test_comments_and_layout_do_not_count(repo, key):
    before = key()
    edit(repo.toy / "method.py", "# why\n" + (repo.toy / "method.py").read_text().replace(" * ", "  *  "))
    assert key() == before


def test_the_repositorys_place_does_not_count(repo, key, tmp_path):
    shutil.copytree(repo.root, tmp_path / "elsewhere")
    script = tmp_path / "elsewhere" / "papers" / "toy" / "train.py"
    assert stage_key(script, {"lr": 0.1}, (), tmp_path / "elsewhere") == key()


@pytest.mark.parametrize(
    "statement",
    [
        "import papers.toy.inner.deep",
        "from papers.toy.inner import deep",
        "from papers.toy.inner.deep import f",
        "from .inner import deep",
        "from .inner.deep import f",
        "from . import inner, method\nfrom papers.toy.inner import deep",
        "def late():\n    from papers.toy.inner.deep import f",
    ],
)
def test_every_form_of_import_is_followed(repo, statement):
    inner = repo.toy / "inner"
    inner.mkdir()
    for name in ("__init__.py", "deep.py"):
        (inner / name).touch()
    edit(repo.toy / "train.py", statement + "\n")
    packages = [repo.root / "papers" / "__init__.py", repo.toy / "__init__.py", inner / "__init__.py"]
    assert {*packages, inner / "deep.py", repo.toy / "train.py"} <= set(code_files(repo.toy / "train.py", repo.root))


def test_a_parents_sibling_is_found_by_a_relative_import(repo):
    (repo.toy / "inner").mkdir()
    (repo.toy / "inner" / "deep.py").write_text("from ..method import gradient\n")
    assert repo.toy / "method.py" in code_files(repo.toy / "inner" / "deep.py", repo.root)


def test_the_machinery_does_not_count(repo):
    machinery = repo.root / "shared" / "experiments"
    machinery.mkdir(parents=True)
    (machinery / "run.py").touch()
    (repo.root / "shared" / "data.py").touch()
    edit(repo.toy / "train.py", "from shared.experiments import run\nfrom shared import data\n")
    found = code_files(repo.toy / "train.py", repo.root)
    assert machinery / "run.py" not in found
    assert repo.root / "shared" / "data.py" in found


def test_a_data_file_beside_the_code_that_names_it_counts(repo, key):
    edit(repo.toy / "words.txt", "a b c")
    before = key()
    edit(repo.toy / "method.py", 'WORDS = "words.txt"\n')
    named = key()
    assert named != before
    edit(repo.toy / "words.txt", "a b d")
    assert key() != named


def test_files_and_directories_that_the_config_names_count(repo, key):
    directory = repo.root / "models" / "gpt2"
    directory.mkdir(parents=True)
    edit(directory / "weights", "1")
    config = {"model": {"path": "models/gpt2"}, "hub": "openai/gsm8k", "data": [str(directory / "weights")]}
    before = key(config)
    assert key(config) == before
    edit(directory / "weights", "2")
    changed = key(config)
    assert changed != before
    edit(directory / "more", "2")
    assert key(config) != changed


def test_a_value_of_slashes_and_dots_is_no_path(key, monkeypatch):
    monkeypatch.setattr("shared.experiments.keys._fingerprint", None)
    assert key({"separator": "/", "here": "./", "up": "../.."}) == key({"separator": "/", "here": "./", "up": "../.."})


def test_code_that_does_not_parse_is_named(repo, key):
    edit(repo.toy / "method.py", "x = 1\ndef (:\n")
    with pytest.raises(UserError, match=r"papers/toy/method\.py:2: "):
        key()
