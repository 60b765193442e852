"""What each paper's machine-readable part has to hold to, whatever the paper."""

import subprocess
import sys

import pytest

from shared.experiments.paper import ROOT, paper_names
from shared.experiments.publish import check_index

RESOLVE = """
import sys
from shared.experiments.paper import load_paper
from shared.experiments.reproduce import _config_class
from shared.experiments.resources import load_resources
from shared.experiments.run import resolve_config

paper = load_paper(sys.argv[1])
config_class = _config_class(paper)
for scale in paper.scales():
    load_resources(paper, scale)
    for arm in paper.select_arms(scale):
        resolve_config(paper, config_class, scale, arm, [])
heavy = sorted({"torch", "transformers", "trl", "datasets", "matplotlib"} & set(sys.modules))
if heavy:
    sys.exit(f"papers/{paper.name}/config.py imports {heavy}: `make list` and the runner have to start at once")
"""


@pytest.mark.parametrize("name", paper_names())
def test_every_config_is_valid_and_light(name):
    result = subprocess.run([sys.executable, "-c", RESOLVE, name], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_tables_of_all_papers_are_up_to_date():
    check_index()
