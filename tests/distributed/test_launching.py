"""What the launch scripts start, and what `adaptive-merge doctor` says about a launch."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from adaptive_merge.cli import doctor
from adaptive_merge.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"


def started(tmp_path, script, *arguments, **environment):
    """The command that a script would run, with stand-ins for srun and python that only say their arguments."""
    for name in ("srun", "python"):
        stand_in = tmp_path / name
        stand_in.write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
        stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
    command = ["bash", str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_scripts_start_what_they_say(tmp_path):
    end = "--trainer.devices 4 --trainer.num_nodes {} --run.if_exists resume"
    slurm = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3", "SLURM_ARRAY_TASK_ID": "1"}
    fit = "srun --kill-on-bad-exit=1 adaptive-merge fit"
    assert started(tmp_path, "slurm/single_node.sh", "--config", "a b.yaml", **slurm) == (
        f"{fit} --config a b.yaml {end.format(1)}"
    )
    assert started(tmp_path, "slurm/multi_node.sh", "--config", "x.yaml", **slurm) == (
        f"{fit} --config x.yaml {end.format(3)}"
    )
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "one.yaml").touch(), (configs / "two.yaml").touch()
    told = started(tmp_path, "slurm/array_of_recipes.sh", str(configs), "--seed_everything", "1", **slurm)
    assert told.startswith(f"{fit} --config {configs}/two.yaml --run.name two --seed_everything 1 --trainer.devices 1")
    assert "nothing to do" in started(
        tmp_path, "slurm/array_of_recipes.sh", str(configs), **slurm | {"SLURM_ARRAY_TASK_ID": "2"}
    )
    assert started(tmp_path, "torchrun.sh", "--config", "x.yaml", PROCESSES="4") == (
        "python -m torch.distributed.run --standalone --nproc-per-node 4 -m adaptive_merge fit --config x.yaml "
        + end.format(1)
    )
    several = started(tmp_path, "torchrun.sh", PROCESSES="4", NODES="2", HEAD="node0:29400", JOB="mine")
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:29400 --rdzv-id mine --nproc-per-node 4" in several


@pytest.mark.parametrize("script", sorted((SCRIPTS / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_slurm_scripts_ask_for_what_preemption_needs(script):
    text = script.read_text()
    for line in ("--signal=SIGUSR1@180", "--requeue", "--open-mode=append", "--ntasks-per-node="):
        assert f"#SBATCH {line}" in text
    assert "#SBATCH --gpus-per-task" not in text and "B:SIGUSR1" not in text


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "this process only"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "SLURM_NTASKS": "1"}, "torchrun, process 1 of 4"),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_PROCID": "3"}, "SLURM job 7, process 3 of 8"),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, "SLURM is not used, for the job is named 'bash'"),
        ({"LOCAL_RANK": "2"}, "local rank 2"),
    ],
)
def test_the_launcher_is_named_with_its_reason(environment, told):
    assert told in doctor.launcher(environment)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SLURM_JOB_NAME": "interactive"}, "turns SLURM mode off"),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "4"}, "is below SLURM_NTASKS_PER_NODE"),
        ({"SLURM_NTASKS": "2"}, "without --ntasks-per-node"),
        ({"SLURM_GPUS_PER_TASK": "1"}, "hides devices"),
        ({"SLURM_JOB_ID": "7"}, "put srun before"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x", "SLURM_NTASKS_PER_NODE": "4"}, "--ntasks-per-node=1"),
    ],
)
def test_traps_are_named(environment, told):
    assert any(told in warning for warning in doctor.traps(environment))


def test_nothing_is_wrong_with_a_plain_launch():
    assert doctor.traps({}) == []


def test_doctor_says_what_it_sees_and_keeps_keys_to_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "planted0key")
    monkeypatch.setenv("WANDB_MODE", "offline")
    doctor.doctor(["--root", str(tmp_path / "runs")])
    told = capsys.readouterr().out
    for word in ("versions", "torch", "devices", "launcher", "runs", "temporary", "same device", "offline", "a key is"):
        assert word in told
    assert "planted0key" not in told
    doctor.doctor(["--root", str(tmp_path / "runs"), "--json"])
    told = capsys.readouterr().out
    assert json.loads(told).keys() >= {"versions", "devices", "launcher", "warnings", "trouble"}
    assert "planted0key" not in told
    assert list(tmp_path.iterdir()) == []


def test_doctor_fails_where_a_run_could_not_start(capsys):
    with pytest.raises(InputError, match="cannot be written to"):
        doctor.doctor(["--root", "/proc/runs"])
    assert "NOT writable" in capsys.readouterr().out
