import errno
import os
import subprocess
import sys

import pytest

from shared.experiments import files
from shared.experiments.errors import UserError


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(UserError, match=f"disk full while writing {path}: free some space"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_during_the_write_is_noticed_too(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(UserError, match="disk full"):
        files.write_atomic(path, full_disk)
    assert not list(tmp_path.iterdir())


NO_SPACE = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from shared.experiments import files

path, values = Path("x"), torch.zeros(1000)
ways = {
    "text": lambda: files.write_text(path, "x" * 2000),
    "state": lambda: files.write_atomic(path, lambda file: torch.save({"a": values, "b": 1}, file), binary=True),
    "torch": lambda: torch.save(values, path),
    "safetensors": lambda: save_file({"a": values}, path),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name, way in ways.items():
    try:
        with files.disk_full_explained(Path("there")):
            way()
    except files.DiskFull as error:
        print(name, error)
"""


def test_whichever_way_a_library_reports_that_there_is_no_space(tmp_path):
    run = subprocess.run([sys.executable, "-c", NO_SPACE], cwd=tmp_path, capture_output=True, text=True)
    assert not run.stderr
    advice = "free some space and run the same command again"
    reached = "limit on file sizes (ulimit -f) reached while writing"
    assert run.stdout.splitlines() == [
        f"text {reached} x: {advice}",
        f"state {reached} x: {advice}",
        f"torch disk full while writing there: {advice}",  # it does not tell more
        f"safetensors {reached} there: {advice}",
    ]


def test_an_error_of_another_kind_is_left_alone():
    with pytest.raises(PermissionError) as caught, files.disk_full_explained("x"):
        raise PermissionError(errno.EACCES, "no")
    assert caught.value.__cause__ is None


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_jsonl(path, [{"a": 2}, {"a": float("nan")}])
    assert files.read_jsonl(path) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("inf")})


def test_a_last_line_cut_short_is_left_out_and_any_other_reported(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert files.read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": \n{"a": 1}\n')
    with pytest.raises(UserError, match=f"{path}:1: not valid JSON"):
        files.read_jsonl(path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"])
def test_a_broken_json_file_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: not valid JSON.*delete it and run again"):
        files.read_json(tmp_path / "x.json")


def test_a_lock_is_held_by_one_process_and_released_when_it_dies(tmp_path):
    hold = "import sys, pathlib, time; from shared.experiments import files\n"
    hold += "with files.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid} on"), files.lock(tmp_path):
        pass
    process.kill()
    process.communicate()
    with files.lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".state.pt.abc.tmp").write_text("half")
    (tmp_path / "state.pt").write_text("whole")
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
