"""From a paper.yaml and its configs to trained arms, verdicts and a report.

Light by design: nothing here imports torch before a stage really runs, so `make list` and `--help` answer at once.
"""

from shared.experiments.config import capped, load_config
from shared.experiments.errors import UserError
from shared.experiments.run import Run, finished_runs, plot_main, stage_main

__all__ = ["Run", "UserError", "capped", "finished_runs", "load_config", "plot_main", "stage_main"]
