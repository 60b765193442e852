import base64
import json
import re
from html.parser import HTMLParser

import pytest

from shared.experiments.report import claimed, duration, interval_plot, number, plain, signed, write_report
from shared.experiments.results import write_results
from shared.experiments.site import newest, write_site

VOID = {"meta", "img", "br", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Checks that tags balance, and collects text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.links, self.ids = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("href", "src"):
                self.links.append(value)
            if name == "id":
                self.ids.add(value)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def results(small_paper, small_runs, run_info):
    return write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)


@pytest.fixture
def report(small_paper, small_runs, results):
    write_report(small_paper, results, small_runs)
    return Page((small_runs / "report.html").read_text())


def test_the_page_says_what_was_claimed_found_and_concluded(report):
    for words in (
        "A Small & Simple Paper",
        "✓ reproduced × 1",
        "Claim number 1.",
        "ours 97.0",
        "ours accuracy − base accuracy > 0.1",
        "+0.67",
        "3 seeds, 10 items",
        "ours seconds < 1",
        "needs <the> GPU",
        "Accuracy by arm",
        "(the paper's Figure 3)",
        "Not drawn: curves",
        "3 min 12 s",
        "300 MiB",
        "torch 2.13.0",
        "0123456789abcdef",
        "make reproduce PAPER=small",
    ):
        assert words in report.text, words


def test_the_page_needs_nothing_but_itself(report, small_runs):
    outside = [link for link in report.links if not link.startswith(("data:", "#", "https://arxiv.org/abs/"))]
    assert outside == []
    png = (small_runs / "figures/accuracy.png").read_bytes()
    assert [base64.b64decode(link.split(",")[1]) for link in report.links if link.startswith("data:")] == [png]
    text = (small_runs / "report.html").read_text()
    assert "<script" not in text
    assert "@import" not in text


def test_each_arm_has_its_training_curve(small_runs, report):
    text = (small_runs / "report.html").read_text()
    assert text.count("<polyline") == 6
    assert text.count('aria-label="training loss by step"') == 2


def test_without_logs_there_is_no_curve(small_paper, small_runs, results):
    for log in small_runs.glob("*/*/log.jsonl"):
        log.unlink()
    write_report(small_paper, results, small_runs)
    assert "<polyline" not in (small_runs / "report.html").read_text()


def test_missing_runs_are_on_the_page(small_paper, small_runs, run_info):
    (small_runs / "base/1/eval.json").unlink()
    results = write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], run_info)
    write_report(small_paper, results, small_runs)
    page = Page((small_runs / "report.html").read_text())
    assert "1 of 6 runs have no results" in page.text
    assert "base, seed 1: no eval.json" in page.text
    assert "base, seed 1: no eval.json" in (small_runs / "report.md").read_text()


def test_smoke_reports_say_that_they_claim_nothing(small_paper, small_runs, run_info):
    results = write_results(small_paper, "smoke", small_runs, [0], ["ours", "base"], run_info)
    write_report(small_paper, results, small_runs)
    assert "claims nothing" in Page((small_runs / "report.html").read_text()).text
    assert "claims nothing" in (small_runs / "report.md").read_text()


def test_a_wall_time_that_leaves_stages_out_says_so(small_paper, small_runs, run_info):
    info = run_info | {"stages": 12, "stages_reused": 4}
    results = write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], info)
    write_report(small_paper, results, small_runs)
    text = (small_runs / "report.md").read_text()
    assert "- wall time: 3 min 12 s (4 of 12 stages had been done before)" in text


def test_text_from_files_is_escaped(small_paper, small_runs, run_info):
    failed = run_info | {"failed": {"base/1": "<script>alert(1)</script>"}}
    results = write_results(small_paper, "tiny", small_runs, [0, 1, 2], ["ours", "base"], failed)
    write_report(small_paper, results, small_runs)
    assert "<script>" not in (small_runs / "report.html").read_text()


def test_markdown_tables_have_whole_rows(small_runs, report):
    text = (small_runs / "report.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()}
        assert len(widths) == 1
    assert "![Accuracy by arm](figures/accuracy.png)" in text


def test_a_report_from_the_file_is_the_report_from_memory(small_paper, small_runs, results, report):
    before = (small_runs / "report.html").read_text()
    write_report(small_paper, json.loads((small_runs / "results.json").read_text()), small_runs)
    assert (small_runs / "report.html").read_text() == before


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.8567, "0.857"),
        (12.345, "12.3"),
        (123.45, "123"),
        (12345.6, "12,300"),
        (-0.05, "−0.0500"),
        (0.00001234, "1.23e−05"),
        (3e9, "3.00e+09"),
    ],
)
def test_three_significant_digits(value, text):
    assert plain(value) == text


@pytest.mark.parametrize(
    ("value", "lo", "hi", "text"),
    [
        (0.123456, 0.1, 0.15, "+0.123"),  # half width 0.025: the third decimal still matters
        (0.5, -1.0, 2.0, "+0.5"),
        (-41.27, -90.0, 10.0, "−41"),
        (0.0, -0.1, 0.1, "0.00"),
        (-0.001, -0.5, 0.5, "0.00"),
        (0.25, 0.25, 0.25, "+0.250"),
        (0.25, None, None, "+0.250"),
    ],
)
def test_an_effect_has_the_decimals_that_its_interval_can_bear(value, lo, hi, text):
    assert signed(value, {"lo": lo, "hi": hi}) == text
    assert number(abs(value), {"lo": lo, "hi": hi}) == text.lstrip("+−")


@pytest.mark.parametrize(
    ("direction", "b", "constant", "margin", "text"),
    [
        ("greater", "y", None, 0.0, "x > y"),
        ("greater", "y", None, 0.05, "x − y > 0.05"),
        ("less", None, 0.5, 0.0, "x < 0.5"),
        ("less", "y", None, -2.0, "x − y < −2"),
        ("equal", "y", None, 0.1, "|x − y| < 0.1"),
    ],
)
def test_comparisons_read_as_formulas(direction, b, constant, margin, text):
    test = {"a": "x", "b": b, "constant": constant, "direction": direction, "margin": margin}
    assert claimed(test) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123, "0.123 s"), (75.0, "75 s"), (192.4, "3 min 12 s"), (7322.0, "2 h 2 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_plot_is_to_scale():
    test = {"direction": "greater", "margin": 0.1, "effect": 0.3, "lo": 0.2, "hi": 0.4, "verdict": "reproduced"}
    text = str(interval_plot(test))

    def position(pattern):
        return float(re.search(pattern, text).group(1))

    zero, margin = position(r'class="zero" x1="([\d.]+)"'), position(r'class="margin" x1="([\d.]+)"')
    lo, hi = position(r'class="ci" x1="([\d.]+)"'), position(r'class="ci" [^>]*x2="([\d.]+)"')
    effect, zone = position(r'cx="([\d.]+)"'), position(r'class="claimed" x="([\d.]+)"')
    step = margin - zero
    assert [lo - zero, effect - zero, hi - zero] == pytest.approx([2 * step, 3 * step, 4 * step], abs=0.3)
    assert zone == margin


# ---- all papers -------------------------------------------------------------------------------------------------


def test_the_index_shows_every_verdict_and_links_to_its_numbers(small_paper, small_runs, report, tmp_path):
    index = write_site([small_paper], tmp_path / "report")
    page = Page(index.read_text())
    assert "Claim number 1. ✓ reproduced" in page.text
    assert "Claim number 2. ✗ not reproduced" in page.text
    assert "Claim number 3. – not testable here" in page.text
    assert "(this machine, 3 seeds)" in page.text
    target, _, anchor = next(link for link in page.links if link.endswith("#C1")).partition("#")
    assert anchor in Page((tmp_path / "report" / target).read_text()).ids


def test_a_paper_without_results_says_how_to_get_them(small_paper, tmp_path):
    assert "make reproduce PAPER=small" in Page(write_site([small_paper], tmp_path / "report").read_text()).text


@pytest.mark.parametrize(("committed", "origin"), [("2020", "this machine"), ("2030", "reference")])
def test_the_newer_of_local_and_committed_results_counts(small_paper, small_runs, results, committed, origin):
    directory = small_paper.directory / "results" / "tiny"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results | {"finished": f"{committed}-01-01T00:00:00Z"}))
    assert newest(small_paper, "tiny").origin == origin
    assert newest(small_paper, "gpu") is None


def test_a_partial_or_changed_local_run_does_not_hide_the_reference(small_paper, small_runs, results):
    def shown_after(**changes):
        (small_runs / "results.json").write_text(json.dumps(results | {"finished": "2030", **changes}))
        entry = newest(small_paper, "tiny")
        return entry.origin, entry.note

    directory = small_paper.directory / "results" / "tiny"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results))
    assert shown_after() == ("this machine", "")
    assert shown_after(seeds=[0, 1, 2, 3]) == ("this machine", "")
    note = "The last run here was partial or with overrides, and has a report of its own: runs/small/tiny/report.html"
    assert shown_after(seeds=[0]) == ("reference", note)
    assert shown_after(arms={"ours": results["arms"]["ours"]}) == ("reference", note)
    assert shown_after(missing=[{"arm": "ours", "seed": 0, "reason": "killed"}]) == ("reference", note)
    assert shown_after(info=results["info"] | {"command": "make reproduce SET='lr=1'"}) == ("reference", note)
    assert note in Page(write_site([small_paper], small_runs / "report").read_text()).text


def test_every_paper_of_the_index_shows_its_figures(small_paper, report, tmp_path):
    index = write_site([small_paper, small_paper], tmp_path / "report")
    sections = index.read_text().split("<section")[1:]
    assert [section.count('<img src="data:image/png;base64,') for section in sections] == [1, 1]
