"""The process behind `MathReward`: reads `[gold, text]` as lines of JSON, writes one word for each.

The kernel ends it when one comparison uses more CPU time than argv[1] seconds, also inside C code. CPU time, not time
on the clock: a busy machine does not change rewards.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
import warnings

MEMORY = 4 * 2**30  # bytes


def main(cpu_seconds: float) -> None:
    logging.disable()  # math-verify warns that its own time limits are off
    warnings.simplefilter("ignore")
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)

    def compare(gold: str, text: str) -> str:
        gold = after_marker(gold)
        if not (re.search(r"(?<!\\)\$", gold) or "\\boxed" in gold):  # \\$ is an amount of dollars
            gold = f"${gold}$"
        gold = parse(gold, [latex, ExprExtractionConfig()], parsing_timeout=None)
        if not gold:
            return "gold_unparsable"
        answer = parse(after_marker(text), [latex], parsing_timeout=None)
        if not answer:
            return "no_answer"
        return "right" if verify(gold, answer, float_rounding=6, timeout_seconds=None) else "wrong"

    # Anything that a library may print must not reach the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF is not handled: it kills
        try:
            outcome = compare(*json.loads(line))
        except MemoryError:
            outcome = "timeout"
        except Exception:  # the paper: whatever goes wrong in a comparison scores 0
            outcome = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(outcome, file=answers, flush=True)


def after_marker(text: str) -> str:
    """What follows the last `####` on its line, as a formula; `text` itself if it has none, or a box."""
    _, marker, after = text.rpartition("####")
    answer = (after.strip().splitlines() or [""])[0].replace("$", "").strip(" *").removesuffix(".")
    return f"${answer}$" if marker and answer and "\\boxed" not in text else text


if __name__ == "__main__":
    main(float(sys.argv[1]))
