"""Is the final answer of a solution right? 1 or 0, by math-verify."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from shared.rewards.contract import Completions, checked, column, log_shares, texts

CPU_SECONDS = 5.0  # for one comparison; simple ones take milliseconds
FAILURES = ("timeout", "gold_unparsable", "no_answer")


class MathReward:
    """1 if the completion's final answer equals the gold answer mathematically, else 0; None if gold has no answer.

    The answer is what stands in `\\boxed{...}`; without one, what follows the last `####`; without either, the last
    LaTeX formula, those announced as the final answer first. No answer, one that cannot be parsed, or a comparison
    that takes more than 5 CPU seconds scores 0. Gold may be a bare answer ("1/2"), LaTeX in `$...$`, or a solution
    with `\\boxed{...}` or `####`.

    Extraction and normalisation are those of Bridging Offline and Online RL (arXiv 2506.21495): LaTeX with the box
    first; basic LaTeX, units, malformed operators and small formatting repaired; six digits.

    Comparisons run in a process of their own: they can hang or exhaust memory, and neither signals nor threads can
    stop that (math-verify's own timeouts need signals, which only work in the main thread).

    gold: name of the dataset's column.
    counts: "rows", "timeout" (or out of memory), "gold_unparsable" and "no_answer" so far.
    """

    __name__ = "math"

    def __init__(self, gold: str = "answer"):
        self.gold = gold
        self.counts: Counter[str] = Counter()

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        gold = column(self.gold, columns, len(completions), self.__name__)
        outcomes = [_WORKER.compare(_as_text(g), text) for g, text in zip(gold, texts(completions), strict=True)]
        happened = Counter({kind: outcomes.count(kind) for kind in FAILURES}, rows=len(outcomes))
        self.counts.update(happened)
        log_shares(happened, columns, self.__name__)
        rewards = [None if outcome == "gold_unparsable" else float(outcome == "right") for outcome in outcomes]
        return checked(rewards, len(completions), self.__name__)


def _as_text(gold: object) -> str:
    """A dataset's missing value is no answer: None, or NaN where other rows hold numbers."""
    return "" if gold is None or gold != gold else str(gold)


class _Worker:
    """A process that compares answers, started when first needed and again after it has died of a hard comparison."""

    def __init__(self):
        self.forget()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Begin anew: a forked process that used its parent's worker would read answers to the parent's questions."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def compare(self, gold: str, text: str) -> str:
        """ "right", "wrong", "no_answer", "gold_unparsable" or "timeout"."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:  # killed from outside
                self._stop()
            if self._process is None:
                self._process = self._start()
            self._process.stdin.write(json.dumps([gold, text]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
            if not answer:  # killed by its limits
                self._stop()
                return "timeout"
            return answer

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._stop()

    def _start(self) -> subprocess.Popen:
        worker = Path(__file__).with_name("verifiable_worker.py")
        # -P: the folder of the script is not searched for modules.
        process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the process that compares answers, {worker}, did not start; see its error above")
        return process

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._process = None


_WORKER = _Worker()
