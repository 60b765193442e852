"""Reproduces a paper; --list names them; --smoke runs each in seconds. `make help` explains the variables."""

import sys
from pathlib import Path

from shared.experiments.reproduce import main

if __name__ == "__main__":
    sys.exit(main(root=Path(__file__).resolve().parents[1]))
