import json
import re

import pytest

from shared.data.hub import load_prompts
from shared.data.prompt_sets import DATASETS, boxed
from shared.experiments.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write(name: str, rows: list[dict]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def numina(problem: str, solution: str = r"So $\boxed{1}$.", source: str = "olympiads") -> dict:
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": source, "problem": problem, "solution": solution, "messages": messages}


def wildchat(key: str, *contents: str, language: str = "English", toxic: bool = False, first: str = "user") -> dict:
    """A row of WildChat-1M, with the features that its card names."""
    turns = [
        {
            "content": content,
            "country": None,
            "hashed_ip": None,
            "header": {"accept-language": "en", "user-agent": "x"},
            "language": language,
            "redacted": False,
            "role": first if i % 2 == 0 else "assistant",
            "state": None,
            "timestamp": None,
            "toxic": toxic,
            "turn_identifier": i,
        }
        for i, content in enumerate(contents)
    ]
    return {
        "conversation_hash": key,
        "model": "gpt-4",
        "conversation": turns,
        "turn": 1,
        "language": "Latin",
        "toxic": True,
        "redacted": True,
    }


# One row of each set as its publisher writes it, and what it becomes.
CASES = {
    "deepscaler": (
        "train",
        {"problem": "1+1?", "answer": "2", "solution": "..."},
        {"item": "deepscaler/0", "question": "1+1?", "answer": "2"},
    ),
    "gsm8k": (
        "test",
        {"question": "How many?", "answer": "600+600=<<600+600=1200>>1200\n#### 1,200"},
        {"item": "gsm8k/0", "question": "How many?", "answer": "1200"},
    ),
    "math500": (
        "test",
        {
            "problem": "What is $x$?",
            "solution": r"\boxed{\frac12}",
            "answer": r"\frac12",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        {
            "item": "test/algebra/1.json",
            "question": "What is $x$?",
            "answer": r"\frac12",
            "subject": "Algebra",
            "level": 2,
        },
    ),
    "amc23": (
        "test",
        {"id": 0, "question": "How far?", "answer": 27.0, "url": "u"},
        {"item": "amc23/0", "question": "How far?", "answer": "27"},
    ),
    "aime25": (
        "test",
        {"problem_idx": 1, "problem": "Find $b$.", "answer": 70, "problem_type": ["Number Theory"]},
        {"item": "aime25/0", "question": "Find $b$.", "answer": "70"},
    ),
    "hmmt25": (
        "test",
        {"problem_idx": 1, "answer": r"\sqrt{2}", "problem": "Find $c$.", "problem_type": ["Algebra"]},
        {"item": "hmmt25/0", "question": "Find $c$.", "answer": r"\sqrt{2}"},
    ),
    "brumo25": (
        "test",
        {"problem_idx": 1, "problem": "Find $d$.", "answer": "2^{99}", "problem_type": ["Geometry"]},
        {"item": "brumo25/0", "question": "Find $d$.", "answer": "2^{99}"},
    ),
    "olympiadbench": (
        "test",
        {"id": 1606, "question": "Solve.", "solution": ["..."], "final_answer": ["$3$", "$-3$"], "subfield": "Algebra"},
        {"item": "olympiadbench/0", "question": "Solve.", "answer": "$3$, $-3$"},
    ),
    "noveltybench": (
        "curated",
        {"id": "curated-0", "category": "Creativity", "prompt": "Tell me a story."},
        {"item": "curated-0", "prompt": user("Tell me a story."), "category": "Creativity"},
    ),
    "alpacaeval": (
        "test",
        {"instruction": "Name actors.", "output": "...", "generator": "text_davinci_003", "dataset": "helpful_base"},
        {"item": "alpacaeval/0", "prompt": user("Name actors."), "dataset": "helpful_base"},
    ),
    "arenahard_v0.1": (
        "test",
        {"uid": "3287", "category": "arena-hard-v0.1", "cluster": "ABC Sequence", "prompt": "Write code."},
        {"item": "3287", "prompt": user("Write code."), "category": "arena-hard-v0.1", "cluster": "ABC Sequence"},
    ),
    "arenahard_v2.0": (
        "test",
        {"uid": "a1", "category": "creative_writing", "subcategory": "poem", "language": "en", "prompt": "Sing."},
        {"item": "a1", "prompt": user("Sing."), "category": "creative_writing", "subcategory": "poem"},
    ),
    "wildchat": (
        "train",
        wildchat("h1", " Hello ", "Hi", "Again"),
        {"item": "h1", "prompt": user("Hello"), "language": "English", "toxic": False, "redacted": False},
    ),
    "similarity": (
        "validation",
        {"prompt": "Name a dog.", "generation_0": "Rex", "generation_1": "Bello", "similar": 0},
        {"item": "similarity/0", "prompt": user("Name a dog."), "responses": ["Rex", "Bello"], "similar": False},
    ),
    "prompts": (
        "test",
        {"prompt": "Why?", "source": "mine"},
        {"item": "prompts/0", "prompt": user("Why?"), "source": "mine"},
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows(name, suffix, write, capsys):
    split, row, expected = CASES[name]
    if "question" in expected:
        expected = {**expected, "prompt": user(expected["question"])}
    assert load_prompts(name, split, source=write("rows" + suffix, [row])) == [expected]
    assert capsys.readouterr().err.splitlines()[-1] == f"{name} ({split}): 1 rows; the source has 1; dropped: none"


def test_every_set_has_a_case():
    assert {*CASES, "numinamath"} == set(DATASETS)


def test_directories(write):
    """As `hf download` leaves them: a file per split, or the one file that is the data among others."""
    rows = {split: {"question": split, "answer": "#### 1"} for split in ("train", "test")}
    for split, row in rows.items():
        folder = write(f"gsm8k/main/{split}-00000-of-00001.parquet", [row]).parents[1]
    for split in rows:
        assert [row["question"] for row in load_prompts("gsm8k", split, source=folder)] == [split]
    write("card/socratic/test-0.parquet", [{"question": "socratic", "answer": "#### 1"}])
    folder = write("card/main/test-0.parquet", [rows["test"]]).parents[1]
    part = "- config_name: {0}\n  data_files:\n  - split: test\n    path: {0}/test-*\n"
    card = "".join(part.format(name) for name in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert [row["question"] for row in load_prompts("gsm8k", "test", source=folder)] == ["test"]
    write("arena/data/arena-hard-v2.0/question.jsonl", [{"uid": "1", "prompt": "p"}])
    folder = write("arena/data/arena-hard-v2.0/model_answer/o3.jsonl", [{"answers": 1}]).parents[3]
    assert load_prompts("arenahard_v2.0", "test", source=folder) == [{"item": "1", "prompt": user("p")}]
    pair = {"prompt": "p", "generation_0": "a", "generation_1": "b", "similar": 1}
    write("classifier/train.jsonl", [pair, pair])
    folder = write("classifier/val.jsonl", [pair]).parent
    assert [len(load_prompts("similarity", split, source=folder)) for split in ("train", "validation")] == [2, 1]


class TestFilters:
    def load(self, write, rows, name="numinamath", split="train", **options):
        return load_prompts(name, split, source=write("rows.jsonl", rows), **options)

    @pytest.mark.parametrize(
        ("problem", "why"),
        [
            ("Prove that $a > b$.", "proof"),
            ("Given $a>b$, show that $a>0$. Then find $c$.", "proof"),
            ("Give a proof of it.", "proof"),
            ("Which? $\\textbf{(A)}\\ 1\\qquad\\textbf{(B)}\\ 2\\qquad\\textbf{(C)}\\ 3$", "multiple choice"),
            ("Which? ( )\nA: $1$\nB: $2$\nC: $3$\nD: $4$", "multiple choice"),
            ("Which?\nA. one\nB. two\nC. three\nD. four", "multiple choice"),
            ("Which? A) 1 B) 2 C) 3 D) 4", "multiple choice"),
            ("  ", "empty"),
        ],
    )
    def test_problems_dropped(self, write, capsys, problem, why):
        rows = [numina("a"), numina("b"), numina("c"), numina(problem)]
        self.load(write, rows)
        assert (
            capsys.readouterr().err.splitlines()[-1]
            == f"numinamath (train): 1 rows; the source has 4; dropped: {why} 1"
        )

    @pytest.mark.parametrize(
        "problem",
        [
            "It can be proved that $x$ exists. Find it.",
            "How many waterproof, approved bags?",
            "A line passes through A. Another meets it in B. Both touch C. Where is D. Dave asks.",
            "Let points A: (0,0) and B: (1,0). Find C.",
            "Compute (a) and (b).",
            "Triangle (ABC) has (A) as its apex.",
        ],
    )
    def test_problems_kept(self, write, capsys, problem):
        self.load(write, [numina("a"), numina("b"), numina("c"), numina(problem)])
        assert "dropped: none" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("solution", "why"),
        [
            (r"Hence $\boxed{B}$.", "multiple choice"),
            (r"Hence $\boxed{\text{(C)}}$", "multiple choice"),
            (r"Hence $\boxed{\textbf{(E) }}$", "multiple choice"),
            ("no answer here", "no answer"),
            ("", "no answer"),
            (r"\boxed{}", "no answer"),
            (r"\boxed{12", "no answer"),
        ],
    )
    def test_solutions_dropped(self, write, capsys, solution, why):
        self.load(write, [numina("a"), numina("b"), numina("c"), numina("d", solution)])
        assert f"dropped: {why} 1\n" in capsys.readouterr().err

    def test_synthetic_sources_and_duplicates(self, write, capsys):
        rows = [numina(f"p{i}", source=s) for i, s in enumerate(["orca_math", "synthetic_amc", "synthetic_math"])]
        rows += [numina("a  d"), numina("b"), numina("a\nd"), numina("c", source="synthetic")]
        kept = [
            row["question"] for split in DATASETS["numinamath"].splits for row in self.load(write, rows, split=split)
        ]
        assert sorted(kept) == ["a  d", "b", "c"]
        assert "dropped: synthetic 3, duplicate 1" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("problem", "dropped"),
        [
            ("In the figure, find $x$.", True),
            ("Find $x$ in the accompanying diagram.", True),
            ("The lines meet as shown.", True),
            ("The graph is shown below.", True),
            ("![](https://x/y.png) Find $x$.", True),
            ("See Fig. 3.", True),
            ("In the figure, find $x$. [asy]draw((0,0)--(1,1));[/asy]", False),
            ("Round to three significant figures.", False),
            ("The graph of $y=x$ is shifted.", False),
            ("He figures out the imaginary part.", False),
        ],
    )
    def test_figures(self, write, capsys, problem, dropped):
        rows = [{"problem": "other", "answer": "1"}, {"problem": problem, "answer": "2"}]
        kept = self.load(write, rows, "deepscaler")
        assert [row["answer"] for row in kept] == (["1"] if dropped else ["1", "2"])
        assert ("needs a figure 1" in capsys.readouterr().err) == dropped

    def test_training_problems_without_answer(self, write, capsys):
        rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": ""}, {"problem": "c", "answer": None}]
        assert [row["question"] for row in self.load(write, rows, "deepscaler")] == ["a"]
        assert "no answer 2" in capsys.readouterr().err

    def test_conversations(self, write, capsys):
        rows = [
            wildchat("1", "Hi", "Hello"),
            wildchat("2", "Hi", "Good day"),
            wildchat("3", " \n", "What?"),
            wildchat("4", "I am a machine", first="assistant"),
            wildchat("5"),
            wildchat("6", "Salut", "Oui", language="French", toxic=True),
        ]
        kept = self.load(write, rows, "wildchat")
        assert [(row["item"], row["language"], row["toxic"]) for row in kept] == [
            ("1", "English", False),
            ("6", "French", True),
        ]
        assert "dropped: no user turn first 2, duplicate 1, empty 1" in capsys.readouterr().err

    def test_keep(self, write, capsys):
        rows = [
            {"uid": str(i), "prompt": "p", "category": c} for i, c in enumerate(["hard_prompt", "creative_writing"])
        ]
        kept = self.load(write, rows, "arenahard_v2.0", "test", keep=lambda row: row["category"] == "creative_writing")
        assert [row["item"] for row in kept] == ["1"]
        assert "dropped: not asked for 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed {  \sqrt{a^{2}} }", r"\sqrt{a^{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1} or \boxed{2", "1"),
        (r"\boxed{a\boxed{b}}", "b"),
        (r"\boxed 5", None),
        ("", None),
        ("\\boxed{1\\", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


class TestSubsets:
    def test_held_out_problems(self, write):
        rows = [numina(f"problem {i}", rf"\boxed{{{i}}}") for i in range(100)]
        ahead, back = write("ahead.jsonl", rows), write("back.jsonl", rows[::-1])
        parts = {s: load_prompts("numinamath", s, source=ahead) for s in ("train", "validation", "test")}
        assert {split: len(part) for split, part in parts.items()} == {"train": 80, "validation": 10, "test": 10}
        assert sorted(int(row["answer"]) for part in parts.values() for row in part) == list(range(100))
        for split, part in parts.items():
            numbers = [int(row["answer"]) for row in part]
            assert numbers == sorted(numbers)  # the dataset's order
            assert numbers != list(range(numbers[0], numbers[0] + len(numbers)))  # and yet from all over it
            again = load_prompts("numinamath", split, source=back)
            assert {row["question"] for row in again} == {row["question"] for row in part}
            kept = load_prompts("numinamath", split, source=ahead, keep=lambda row: int(row["answer"]) % 2 == 0)
            assert kept == [row for row in part if int(row["answer"]) % 2 == 0]
            few = load_prompts("numinamath", split, source=ahead, limit=5, seed=3)
            assert len(few) == 5
            assert all(row in part for row in few)

    def test_1980_are_held_out_of_many(self, write):
        source = write("rows.parquet", [numina(f"problem {i}") for i in range(20000)])
        sizes = [len(load_prompts("numinamath", s, source=source)) for s in ("train", "validation", "test")]
        assert sizes == [20000 - 2 * 1980, 1980, 1980]

    def test_random_subsets(self, write):
        source = write("rows.jsonl", [wildchat(str(i), f"prompt {i % 190}") for i in range(200)])

        def items(**options):
            return [int(row["item"]) for row in load_prompts("wildchat", "train", source=source, **options)]

        few, more = items(limit=20, seed=1), items(limit=50, seed=1)
        assert few == items(limit=20, seed=1) == sorted(few)
        assert (len(few), len(more), len(set(more))) == (20, 50, 50)
        assert set(few) < set(more)
        assert set(items(limit=20, seed=2)) != set(few)
        assert len(items()) == len(items(limit=190)) == 190
        counts = [0] * 4
        for seed in range(40):
            for item in items(limit=10, seed=seed):
                counts[item // 50] += 1
        assert all(60 < count < 140 for count in counts)  # 100 expected of each quarter, with a deviation of 8.7

    def test_template(self, write):
        source = write("rows.jsonl", [{"question": "What is {x}?", "answer": 3}])
        [row] = load_prompts("amc23", "test", source=source, template="Solve: {prompt}\nEnd with \\boxed{}.")
        assert row["prompt"] == user("Solve: What is {x}?\nEnd with \\boxed{}.")
        assert row["question"] == "What is {x}?"


class TestBadInput:
    @pytest.mark.parametrize("name", sorted(CASES))
    def test_missing_column(self, name, write):
        split, row, _ = CASES[name]
        for column in DATASETS[name].columns:
            source = write(f"{column}.jsonl", [{**{k: v for k, v in row.items() if k != column}, "other": 1}])
            with pytest.raises(UserError, match=rf"{re.escape(name)} \({split}\): no column '{column}'.*has .*'other'"):
                load_prompts(name, split, source=source)

    @pytest.mark.parametrize(
        ("name", "column", "value", "message"),
        [
            ("math500", "problem", " ", "row 1: 'problem' must be a non-empty string, not ' '"),
            ("math500", "problem", None, "row 1: 'problem' must be a non-empty string, not None"),
            ("math500", "answer", "", "row 1: 'answer' is empty"),
            ("math500", "answer", None, "row 1: 'answer' is empty"),
            ("olympiadbench", "final_answer", [], "row 1: 'final_answer' is empty"),
            ("gsm8k", "answer", "1200", "row 1: no answer after `####`"),
            ("similarity", "similar", 2, "row 1: 'similar' must be 0 or 1, not 2"),
            ("similarity", "generation_1", "", "row 1: 'generation_1' must be a non-empty string"),
            ("noveltybench", "prompt", "", "row 1: 'prompt' must be a non-empty string"),
            ("noveltybench", "id", "curated-0", "rows 0 and 1 have the same identifier 'curated-0'"),
        ],
    )
    def test_bad_row(self, name, column, value, message, write):
        split, row, _ = CASES[name]
        other = {**row, column: value}
        if "id" in row and column != "id":
            other["id"] = "other" if isinstance(row["id"], str) else 7
        with pytest.raises(UserError, match=re.escape(f"{name} ({split}): {message}")):
            load_prompts(name, split, source=write("rows.jsonl", [row, other]))

    @pytest.mark.parametrize(
        ("name", "row", "message"),
        [
            ("math500", {"problem": 5, "answer": "1"}, "'problem' must be a non-empty string, not 5"),
            ("math500", {"problem": "p", "answer": True}, "an answer must be a string or a number, not True"),
            ("math500", {"problem": "p", "answer": {"x": 1}}, "an answer must be a string or a number"),
            ("wildchat", {"conversation": "hello"}, "'conversation' must be a list of turns, not 'hello'"),
            ("numinamath", {"source": "math", "problem": 1, "solution": "s"}, "must be strings, not 1 and 's'"),
        ],
    )
    def test_other_types(self, name, row, message, write):
        split = next(iter(DATASETS[name].splits))
        with pytest.raises(UserError, match=re.escape(f"row 0: {message}" if name != "numinamath" else message)):
            load_prompts(name, split, source=write("rows.jsonl", [row]))

    def test_arguments(self, write, tmp_path):
        with pytest.raises(UserError, match=r"unknown prompt set 'mat500' \(did you mean 'math500'\?\); valid: numina"):
            load_prompts("mat500", "test")
        with pytest.raises(UserError, match="unknown split of math500 'train'; valid: test"):
            load_prompts("math500", "train")
        source = write("rows.jsonl", [CASES["math500"][1]])
        with pytest.raises(UserError, match="limit must be at least 1, got 0"):
            load_prompts("math500", "test", source=source, limit=0)
        with pytest.raises(UserError, match=r"math500 \(test\): wanted 2 rows; the source has 1 that can be used"):
            load_prompts("math500", "test", source=source, limit=2)
        with pytest.raises(UserError, match=r"wanted some rows; the source has 0"):
            load_prompts("math500", "test", source=source, keep=lambda row: False)
        with pytest.raises(UserError, match=r"the template has no \{prompt\}: 'Solve it'"):
            load_prompts("math500", "test", source=source, template="Solve it")

    def test_files(self, tmp_path):
        with pytest.raises(UserError, match=r"no such file or directory: .*gone\.jsonl.*hf download"):
            load_prompts("math500", "test", source=tmp_path / "gone.jsonl")
        with pytest.raises(UserError, match="similarity is not on the hub: give it as source; data/classifier/train"):
            load_prompts("similarity", "train")
        (tmp_path / "rows.txt").write_text("x")
        with pytest.raises(UserError, match=r"the name of a data file ends with \.jsonl, \.json, \.parquet"):
            load_prompts("math500", "test", source=tmp_path / "rows.txt")
        (tmp_path / "bad.jsonl").write_text('{"problem": "p"')
        with pytest.raises(
            UserError, match=r"(?s)cannot load math500 \(test\) from .*bad\.jsonl: .*JSON parse error.*hf download"
        ):
            load_prompts("math500", "test", source=tmp_path / "bad.jsonl")


class TestHub:
    @pytest.mark.parametrize(
        ("name", "split", "call"),
        [
            ("gsm8k", "test", (("openai/gsm8k", "main"), {"split": "test"})),
            ("aime25", "test", (("MathArena/aime_2025", None), {"split": "train"})),
            ("noveltybench", "curated", (("yimingzhang/novelty-bench", None), {"split": "curated"})),
            (
                "alpacaeval",
                "test",
                (("json",), {"data_files": "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json", "split": "train"}),
            ),
        ],
    )
    def test_calls(self, name, split, call, monkeypatch):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list([CASES[name][1]])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert len(load_prompts(name, split)) == 1
        assert calls == [call]

    def test_another_dataset(self, monkeypatch):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return datasets.Dataset.from_list([CASES["aime25"][1]])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        load_prompts("aime25", "test", source="me/my-aime")
        assert calls == [(("me/my-aime", None), {"split": "train"})]

    def test_out_of_reach(self, monkeypatch):
        def offline(*args, **kwargs):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(datasets, "load_dataset", offline)
        message = (
            r"(?s)cannot load wildchat \(train\) from allenai/WildChat-1M: no route to host.*"
            r"hf download --repo-type dataset allenai/WildChat-1M --local-dir DIR.* source"
        )
        with pytest.raises(UserError, match=message):
            load_prompts("wildchat", "train")


def test_real_gsm8k(real_data):
    for split, size in (("train", 7473), ("test", 1319)):
        rows = load_prompts("gsm8k", split, source=real_data / "gsm8k")
        assert len(rows) == size
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) for row in rows)
