import json
import re
from fractions import Fraction

import pytest

from shared.data.gsm8k import load_gsm8k, load_icot
from shared.experiments.errors import UserError

ROW = {
    "question": "Ann has 3 bags of 400 nuts and eats 5. How many are left?",
    "answer": "She had 3*400=<<3*400=1200>>1200 nuts.\nNow 1200-5=<<1200-5=1195>>1195 are left.\n#### 1,195",
}
EXPECTED = {
    "question": ROW["question"],
    "steps": ["<<3*400=1200>>", "<<1200-5=1195>>"],
    "solution": "She had 3*400=1200 nuts.\nNow 1200-5=1195 are left.",
    "answer": "1195",
}


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_gsm8k_row(write):
    path = write("test.jsonl", json.dumps(ROW) + "\n")
    assert load_gsm8k(str(path)) == [EXPECTED]
    assert load_gsm8k(str(path.parent), "test") == [EXPECTED]


def test_icot_row(write):
    # U+2028 is a line break to str.splitlines, but not the end of a row.
    text = "Two\u2028parts?||<<3*400=1200>> <<1200-5=1195>> #### 1,195\nHow?|| #### 9\n"
    assert load_icot(write("train.txt", text)) == [
        {"question": "Two\u2028parts?", "steps": ["<<3*400=1200>>", "<<1200-5=1195>>"], "answer": "1195"},
        {"question": "How?", "steps": [], "answer": "9"},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"', "row 1 is not JSON"),
        ("[1]", "row 1: needs a non-empty string 'question'"),
        ('{"question": "q"}', "row 1: needs a non-empty string 'answer'"),
        ('{"question": "", "answer": "#### 1"}', "row 1: needs a non-empty string 'question'"),
        ('{"question": "q", "answer": 5}', "row 1: needs a non-empty string 'answer'"),
        ('{"question": "q", "answer": "five"}', "row 1: no answer after `####`"),
        ('{"question": "q", "answer": "five ####"}', "row 1: no answer after `####`"),
    ],
)
def test_bad_gsm8k_row(write, line, message):
    path = write("train.jsonl", json.dumps(ROW) + "\n" + line)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {message}"):
        load_gsm8k(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no bars #### 3", "no `question||`"),
        ("||<<1+1=2>> #### 2", "no `question||`"),
        ("q||<<1+1=2>>", "no answer after `####`"),
        ("q||so <<1+1=2>> #### 2", "'so' stands between the steps"),
        ("", "no `question||`"),
    ],
)
def test_bad_icot_row(write, line, message):
    path = write("train.txt", f"q||<<1+1=2>> #### 2\n{line}\nq||#### 3\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: row 1: {message}")):
        load_icot(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file; GSM8K is openai/gsm8k on the hub"):
        load_gsm8k(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        load_gsm8k(str(tmp_path), "test")
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        load_icot(tmp_path / "gone.txt")
    (tmp_path / "train.txt").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(UserError, match=r"train\.txt: not UTF-8 text"):
        load_icot(tmp_path / "train.txt")


def test_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_gsm8k(split="test") == [EXPECTED]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"(?s)cannot load openai/gsm8k \(test\).*no route to host.*hf download"):
        load_gsm8k(split="test")


def value(expression: str) -> Fraction:
    """The value of an equation's side; SyntaxError and the like if it is none."""
    text = re.sub(r"(\d*\.\d+|\d+\.?)", r"Fraction('\1')", expression.replace(",", "").replace("%", "/100"))
    return eval(text, {"Fraction": Fraction})


def test_real_gsm8k(real_data):
    train, test = (load_gsm8k(str(real_data / "gsm8k"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    for row in train + test:
        assert re.fullmatch(r"-?\d+(\.\d+)?", row["answer"])
        assert "<<" not in row["solution"]
        assert "#" not in row["solution"][-10:]
    assert sum(not row["steps"] for row in train) == 95
    assert not {row["question"] for row in train} & {row["question"] for row in test}


def test_real_icot(real_data):
    rows = load_icot(real_data / "gsm8k_icot" / "valid.txt")
    assert len(rows) == 500
    assert sum(not row["steps"] for row in rows) == 6
    # Nothing was cut off or glued together: nearly all equations hold, and the last ones mostly give the answer.
    holds = [
        abs(value(left) - value(right)) <= abs(value(left)) / 50
        for row in rows
        for left, _, right in (step[2:-2].partition("=") for step in row["steps"])
    ]
    assert sum(holds) > 0.97 * len(holds)
    last = [value(row["steps"][-1][2:-2].partition("=")[2]) == value(row["answer"]) for row in rows if row["steps"]]
    assert sum(last) > 0.9 * len(last)
