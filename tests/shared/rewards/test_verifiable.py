import os
import signal
import threading

import pytest

from shared.experiments.errors import UserError
from shared.rewards import verifiable
from shared.rewards.verifiable import MathReward

CASES = [
    ("1/2", r"so $x=3$, hence \boxed{\frac{1}{2}}.", 1),
    ("1/2", r"The final answer is $\boxed{0.5}$. I hope it is correct.", 1),
    (r"$\frac{1}{2}$", r"\boxed{\frac{1}{3}}", 0),
    (r"We get \boxed{12}", r"答案是 $\boxed{12}$。", 1),
    ("48/2=<<48/2=24>>24\n#### 1,234", "first 9\n#### 1234", 1),
    ("72", "#### $72", 1),
    ("72", "#### 7\nwrong, so\n#### 72\nand some chatter", 1),
    ("72", "#### 72\nthen #### 7", 0),
    ("72", r"#### 72 but \boxed{71}", 0),
    ("7", r"$3 + 4 = 8$ and then \boxed{7}", 1),
    ("7", r"\boxed{6} or \boxed{7}", 0),  # not one answer
    ("72", "", 0),
    ("72", "I do not know", 0),
    ("72", r"so it is \boxed{72", 0),  # truncated
    ("72", "####", 0),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
    ("3", r"\boxed{\text{π≈3}}", 0),
    ("72", "#### 72.", 1),
    ("72", "#### **72**", 1),
    (r"\$1,250", r"\boxed{1250}", 1),  # dollars in gold are no formula's begin
    (r"\$18", r"\boxed{\$18}", 1),
    (r"$\$18$", r"\boxed{19}", 0),
    ("$3$, $-3$", r"\boxed{-3, 3}", 1),
    ("$3$, $-3$", r"\boxed{3}", 0),
]


@pytest.fixture
def reward():
    return MathReward()


def test_answers_in_all_their_forms(reward):
    gold, texts, expected = zip(*CASES, strict=True)
    scores = reward(["p"] * len(CASES), list(texts), answer=list(gold))
    assert dict(zip(texts, scores, strict=True)) == dict(zip(texts, expected, strict=True))
    assert reward.counts["rows"] == len(CASES)
    assert reward.counts["no_answer"] >= 3
    assert reward.counts["gold_unparsable"] == reward.counts["timeout"] == 0


def test_chat_and_a_column_of_another_name():
    completion = [{"role": "assistant", "content": r"\boxed{4}"}]
    assert MathReward("solution")([[{"role": "user", "content": "2+2"}]], [completion], solution=[4]) == [1]


def test_gold_without_an_answer_does_not_apply(reward):
    logged = {}
    scores = reward(["p"] * 2, [r"\boxed{1}"] * 2, answer=["", "1"], log_metric=logged.__setitem__)
    assert scores == [None, 1]
    assert logged == {"math/gold_unparsable": 0.5, "math/no_answer": 0, "math/timeout": 0}
    assert reward(["p"] * 3, [r"\boxed{1}"] * 3, answer=[None, float("nan"), 1.0]) == [None, None, 1]


def test_missing_column_and_wrong_number_of_rows(reward):
    with pytest.raises(UserError, match=r"math needs the dataset column 'answer'; the dataset has: question, solution"):
        reward(["p"], ["a"], solution=["1"], question=["?"])
    with pytest.raises(ValueError, match="column 'answer' has 1 rows for 2 completions"):
        reward(["p"] * 2, ["a"] * 2, answer=["1"])


def test_a_hard_comparison_is_stopped_also_in_a_thread(reward, monkeypatch):
    """The worker is killed inside one long multiplication, which no Python signal handler could stop."""
    worker = verifiable._Worker()
    monkeypatch.setattr(verifiable, "_WORKER", worker)
    monkeypatch.setattr(verifiable, "CPU_SECONDS", 2.0)
    scores = []
    texts = [r"\boxed{1}", r"\boxed{7^{9^{9^{9}}} - 7^{9^{9^{9}}} + 2}", r"\boxed{1}"]
    thread = threading.Thread(target=lambda: scores.extend(reward(["p"] * 3, texts, answer=["1"] * 3)))
    thread.start()
    thread.join()
    assert reward.counts["timeout"] == 1
    assert scores == [1, 0, 1]  # the next comparison has a new process
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert reward(["p"], texts[:1], answer=["1"]) == [1]
    worker.close()
    assert worker._process is None


def test_a_forked_process_has_a_worker_of_its_own(reward):
    """With its parent's it would read the answers to the parent's questions."""
    right, wrong = [r"\boxed{1}"], [r"\boxed{2}"]
    assert reward(["p"], right, answer=["1"]) == [1]
    parents = verifiable._WORKER._process
    child = os.fork()
    if child == 0:
        ok = False
        try:
            ok = reward(["p"], wrong, answer=["1"]) == [0] and verifiable._WORKER._process.pid != parents.pid
            verifiable._WORKER.close()
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verifiable._WORKER._process is parents
    assert reward(["p"] * 2, right + wrong, answer=["1"] * 2) == [1, 0]
