"""scripts/bench/mta.py: what it measures, and by what."""

import importlib.util
import json
import sys

import pytest

from shared.experiments.paper import ROOT


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_mta", ROOT / "scripts" / "bench" / "mta.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "plot", lambda rows, directory: None)

    def run(*arguments) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["mta.py", *map(str, arguments)])
        module.main()

    module.run = run
    return module


def test_every_way_is_measured_for_every_kernel_on_a_cpu(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "isolated", lambda function, task: function(task))
    sizes = ["--lengths", "20,40", "--heads", 2, "--dim", 8, "--turns", 1]
    bench.run("--device", "cpu", "--what", ",".join(bench.WHAT), *sizes, "--out", tmp_path)
    rows = json.loads((tmp_path / "mta.json").read_text())["rows"]
    assert {(row["what"], row["way"], row["length"]) for row in rows} == {
        (what, way, length)
        for what in ("kq_pre", "kq", "heads", "all")
        for way in ("reference", "chunked", "sdpa", "roofline")
        for length in (20, 40)
    }
    assert all(0 < row["forward_ms"] < row["both_ms"] for row in rows if row["way"] == "roofline")
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in rows)


def test_what_a_gpu_is_asked(bench, monkeypatch, tmp_path):
    """By default everything, without a GPU as far as the plan; a step that takes too long ends a way's lengths."""
    import torch

    def made_up(function, task):
        if function is bench.matmul_flops:
            return 1e12
        if task.way == "reference" and task.length > 4096:
            return {"failed": "out of memory"}
        slow = task.way == "chunked" and task.length >= 1024
        return {"forward_ms": 1.0, "both_ms": 1e5 if slow else 2.0, "peak_mb": 3.0}

    monkeypatch.setattr(bench, "isolated", made_up)
    monkeypatch.setattr(bench, "version", lambda package: "0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made-up")
    bench.run("--device", "cuda", "--out", tmp_path)
    rows = json.loads((tmp_path / "mta.json").read_text())["rows"]
    for what in bench.WHAT:
        measured = {row["way"] for row in rows if row["what"] == what}
        assert measured - {"liger"} == {"reference", "chunked", "triton", "sdpa", "roofline"}
    lengths = {way: [row["length"] for row in rows if row["what"] == "all" and row["way"] == way] for way in bench.WAYS}
    assert lengths["triton"] == [512, 1024, 2048, 4096, 8192, 16384]
    assert lengths["chunked"] == [512, 1024]
    assert lengths["reference"] == [512, 1024, 2048, 4096, 8192]


def test_roofline_counts_the_operations_of_the_equations(bench):
    task = bench.Task("roofline", "all", 3, 2, 4, 8, "float32", "cpu", 1)
    operations = 0
    for query in range(3):
        for _key in range(query + 1):
            products = 2 * 2 * 8  # logits and values, multiplied and added
            convolutions, mixings = 2 * 2 * 6 * 11, 2 * 2 * 4
            operations += 2 * 4 * (products + convolutions + mixings)
    assert bench.roofline(task, 1e3)["forward_ms"] == pytest.approx(operations)


def test_unknown_names_are_refused(bench, capsys):
    for arguments, valid in ((["--what", "kp"], "kq_pre, kq, heads, all"), (["--ways", "fast"], "reference, chunked")):
        with pytest.raises(SystemExit):
            bench.run("--device", "cpu", *arguments)
        assert valid in capsys.readouterr().err
