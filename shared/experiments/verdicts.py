"""The four verdicts on a claim. Apart from claims.py, which needs numpy, so that `make list` answers at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

REPRODUCED, WEAK, NOT_REPRODUCED = "reproduced", "weak", "not reproduced"
NOT_TESTABLE = "not testable here"
VERDICTS = (REPRODUCED, WEAK, NOT_REPRODUCED, NOT_TESTABLE)  # best first


def tally(results: Mapping) -> list[tuple[str, int]]:
    """How many claims of a results.json have which verdict, best first."""
    counts = Counter(claim["verdict"] for claim in results["claims"])
    return [(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]]
