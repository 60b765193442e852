import os
import subprocess

import pytest

from shared.experiments import resources
from shared.experiments.errors import UserError
from shared.experiments.paper import load_paper
from shared.experiments.resources import Resources, slots, stage_command, visible_gpus


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, gpus): pretends that this one has as many."""

    def pretend(cores, gpus):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(resources, "gpu_names", lambda: ["GPU"] * gpus)

    return pretend


def threads(found):
    return [int(slot["OMP_NUM_THREADS"]) for slot in found]


def devices(found):
    return [slot.get("CUDA_VISIBLE_DEVICES") for slot in found]


@pytest.mark.parametrize(
    ("cores", "settings", "jobs", "runs", "expected"),
    [
        (2, {}, None, 18, [1, 1]),  # one job per core
        (8, {}, 2, 18, [4, 4]),  # JOBS=2 share the cores
        (8, {}, None, 3, [2, 2, 2]),  # fewer runs than cores
        (8, {"threads": 4}, None, 18, [4, 4]),
        (8, {"threads": 3}, None, 18, [3, 3]),
        (2, {"threads": 4}, None, 18, [4]),
        (2, {}, 5, 18, [1] * 5),
        (8, {"processes": 2}, None, 18, [1, 1, 1, 1]),
        (8, {"processes": 2}, 1, 18, [4]),
    ],
)
def test_cores_are_shared_out(machine, cores, settings, jobs, runs, expected):
    machine(cores, 0)
    found = slots(Resources(**settings), jobs, runs)
    assert threads(found) == expected
    assert devices(found) == [None] * len(found)


@pytest.mark.parametrize(
    ("gpus", "processes", "jobs", "expected"),
    [
        (4, 1, None, ["0", "1", "2", "3"]),
        (4, 2, None, ["0,1", "2,3"]),
        (3, 2, None, ["0,1"]),
        (1, 1, 2, ["0", "0"]),  # two jobs share the one GPU because JOBS=2 says so
        (4, 4, None, ["0,1,2,3"]),
    ],
)
def test_gpus_are_shared_out(machine, gpus, processes, jobs, expected):
    machine(16, gpus)
    assert devices(slots(Resources(processes=processes), jobs, 18)) == expected


def test_too_few_gpus_are_an_error(machine):
    machine(16, 2)
    with pytest.raises(UserError, match=r"a run takes 4 GPUs and there are 2: SET='run.processes=2'"):
        slots(Resources(processes=4), None, 18)


def test_cuda_visible_devices_is_respected(machine, monkeypatch):
    machine(16, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8a1")
    assert visible_gpus() == ["5", "GPU-8a1"]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert visible_gpus() == []


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (
            "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-2)\nGPU 1: NVIDIA A100 (UUID: GPU-3)",
            ["NVIDIA H200", "NVIDIA A100"],
        ),
        ("No devices found.\n", []),
    ],
)
def test_nvidia_smi_is_read(monkeypatch, output, names):
    monkeypatch.setattr(resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, output, ""))
    assert resources.gpu_names.__wrapped__() == names


def test_a_driver_that_does_not_answer_means_no_gpu(monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(9, command)

    monkeypatch.setattr(resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", fail)
    assert resources.gpu_names.__wrapped__() == []


def test_several_processes_go_through_accelerate_and_evaluation_is_one(repo):
    paper = load_paper("toy", repo.root / "papers")
    assert Resources(processes=4).accelerate == "ddp"
    many = Resources(processes=4, accelerate="fsdp2")
    training = stage_command(paper, "train", many, ["--arm", "fast"])
    assert training[-4:] == ["-m", "papers.toy.train", "--arm", "fast"]
    assert training[training.index("--num_processes") + 1] == "4"
    assert training[training.index("--config_file") + 1] == str(repo.root / "scripts" / "accelerate" / "fsdp2.yaml")
    assert stage_command(paper, "eval", many, [])[1:] == ["-m", "papers.toy.eval"]
    assert stage_command(paper, "train", Resources(), [])[1:] == ["-m", "papers.toy.train"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_its_config_files(repo, name):
    """Through the checks that `accelerate launch` itself makes of a config file and command line."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(repo.root / "scripts" / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    command = ["--config_file", path, "--num_processes", "2", "--main_process_port", "0", "-m", "papers.toy.train"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == 2
    assert args.multi_gpu == (name == "ddp")
    assert args.use_fsdp == (name == "fsdp2")
    assert args.use_deepspeed == (name == "zero3")
    if name == "fsdp2":
        assert str(args.fsdp_version) == "2"
        assert args.fsdp_state_dict_type == "FULL_STATE_DICT"
    if name == "zero3":
        assert args.zero_stage == 3
