"""What the files in scripts/launch start, and what `adaptive-merge doctor` says about a launch."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from shells import accepted

from adaptive_merge.cli import doctor
from adaptive_merge.cli.grid import settings_of
from adaptive_merge.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"


def started(tmp_path, script, *arguments, **environment):
    """The command that a script would run, with stand-ins that only say their arguments."""
    for name in ("torchrun", "python"):
        stand_in = tmp_path / name
        stand_in.write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
        stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_torchrun_is_started_with_what_the_script_is_told(tmp_path):
    script = SCRIPTS / "launch" / "torchrun.sh"
    assert started(tmp_path, script, "--config", "a b.yaml", PROCESSES="4") == (
        "python -m torch.distributed.run --standalone --nproc-per-node 4 -m adaptive_merge fit --config a b.yaml "
        "--trainer.devices 4 --trainer.num_nodes 1 --run.if_exists resume"
    )
    several = started(tmp_path, script, PROCESSES="4", NODES="2", HEAD="node0:29400", JOB="mine")
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:29400 --rdzv-id mine --nproc-per-node 4" in several


def test_the_trainjob_starts_a_run_that_resumes():
    job = yaml.safe_load((SCRIPTS / "launch" / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"} and trainer["image"]
    assert trainer["command"] == ["torchrun", "-m", "adaptive_merge", "fit"]
    settings = settings_of(trainer["args"])
    assert settings["run"]["if_exists"] == "resume" and settings["run"]["name"] == job["metadata"]["name"]
    devices = int(settings["trainer"]["devices"])
    assert devices == trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert settings["trainer"]["num_nodes"] == trainer["numNodes"]
    assert {"name": "ADAPTIVE_MERGE_JOB", "value": job["metadata"]["name"]} in trainer["env"]
    (replicated,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert mounts["runs"] == settings["run"]["root"] and {one["name"] for one in pod["volumes"]} == mounts.keys()


def test_the_skypilot_job_starts_a_run_that_resumes(tmp_path):
    job = yaml.safe_load((SCRIPTS / "launch" / "skypilot.yaml").read_text())
    given = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "4", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/bash\n" + job["run"])
    accepted(script)
    told = started(tmp_path, script, **{f"SKYPILOT_{name}": value for name, value in given.items()})
    launch, _, arguments = told.partition(" -m adaptive_merge fit ")
    assert launch == ("torchrun --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr 10.0.0.1 --master-port 29400")
    settings = settings_of(arguments.split())
    assert (int(settings["trainer"]["devices"]), settings["trainer"]["num_nodes"]) == (4, 2)
    assert settings["run"]["if_exists"] == "resume" and settings["run"]["name"] == job["envs"]["ADAPTIVE_MERGE_JOB"]
    assert job["file_mounts"][settings["run"]["root"]]["mode"] == "MOUNT_CACHED"


@pytest.mark.parametrize("script", sorted(SCRIPTS.rglob("*.sh")), ids=lambda path: path.name)
def test_shells_accept_every_script(script):
    accepted(script)


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
