"""From a paper.yaml and its configs to trained arms, verdicts and a report.

Light by design: nothing here imports torch before a stage really runs, so `make list` and `--help` answer at once.
"""

from shared.experiments.config import capped, load_config
from shared.experiments.errors import UserError
from shared.experiments.run import Run, stage_main

__all__ = ["Run", "UserError", "capped", "load_config", "stage_main"]
