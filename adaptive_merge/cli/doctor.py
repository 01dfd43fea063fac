"""`adaptive-merge doctor`: what this machine and this launch look like to the trainer."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.errors import InputError
from adaptive_merge.files import strict_json
from adaptive_merge.process.signals import INTERACTIVE
from adaptive_merge.runs.checkpoint_io import StorageError, check_writable, nearest

__all__ = ["disk", "doctor", "launcher", "traps"]

_PACKAGES = ("adaptive_merge", "torch", "torchvision", "pytorch-lightning", "jsonargparse", "open_clip_torch", "wandb")
_LITTLE_ROOM = 1 << 30  # bytes


def doctor(arguments: list[str]) -> None:
    """Print versions, devices, launcher, disks and wandb's mode; exit code 2 where a run could not start."""
    parser = Parser("adaptive-merge doctor", description=doctor.__doc__)
    parser.add_argument("--root", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    options = parser.parse_args(arguments)
    found, trouble = disk(Path(options.root))
    found = {"versions": _versions(), "devices": _devices(), "launcher": launcher(os.environ), **found}
    found["wandb"] = _wandb(os.environ)
    warnings = traps(os.environ)
    if options.json:
        write(strict_json(found | {"warnings": warnings, "trouble": trouble}, indent=2))
    else:
        for what, told in [*found.items(), *(("warning", warning) for warning in warnings)]:
            write(f"{what:<12} {told}")
    if trouble:
        raise InputError("; ".join(trouble))


def launcher(environment: Mapping[str, str]) -> str:
    """Which of Lightning's environments a run started here would take, and by what it shows.

    The order is Lightning's: torchrun before SLURM, for torchrun is also used inside SLURM jobs.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return f"torchrun, process {environment.get('RANK')} of {environment.get('WORLD_SIZE')} (TORCHELASTIC_RUN_ID)"
    name = environment.get("SLURM_JOB_NAME")
    if "SLURM_NTASKS" in environment and name in INTERACTIVE:
        return f"this process only: SLURM is not used, for the job is named {name!r} (SLURM_JOB_NAME)"
    if "SLURM_NTASKS" in environment:
        rank, world = environment.get("SLURM_PROCID", "?"), environment["SLURM_NTASKS"]
        return f"SLURM job {environment.get('SLURM_JOB_ID')}, process {rank} of {world} (SLURM_NTASKS)"
    if "LSB_JOBID" in environment:
        return f"LSF job {environment['LSB_JOBID']} (LSB_JOBID)"
    if "LOCAL_RANK" in environment:
        return f"a process of another launcher, local rank {environment['LOCAL_RANK']} (LOCAL_RANK)"
    return "this process only; with --trainer.devices above 1 it starts the others itself (no launcher's variables)"


def traps(environment: Mapping[str, str]) -> list[str]:
    """Settings of a launch that are known to go wrong, and what to do about each."""
    found = []
    inside = "SLURM_JOB_ID" in environment
    tasks, per_node = (environment.get(name, "") for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"))
    elastic = "TORCHELASTIC_RUN_ID" in environment
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE:
        found.append("a SLURM job named 'bash' or 'interactive' turns SLURM mode off; give it another --job-name")
    if tasks.isdigit() and per_node.isdigit() and int(tasks) < int(per_node):
        found.append(f"SLURM_NTASKS={tasks} is below SLURM_NTASKS_PER_NODE={per_node}: set --nodes × --ntasks-per-node")
    if tasks.isdigit() and int(tasks) > 1 and not per_node:
        found.append(f"--ntasks={tasks} without --ntasks-per-node is not supported: give --ntasks-per-node")
    if environment.get("SLURM_GPUS_PER_TASK"):
        found.append("--gpus-per-task hides devices from the processes of a node; use --gpus-per-node")
    if inside and not elastic and "SLURM_PROCID" not in environment:
        found.append("inside a SLURM job but not under srun: put srun before the command")
    if inside and elastic and per_node not in ("", "1"):
        found.append("torchrun inside sbatch starts its own processes: set --ntasks-per-node=1")
    if inside and shutil.which("scontrol") is None:
        found.append("no scontrol on this node: SIGUSR1 will save and end the run, but not requeue it")
    return found


def disk(root: Path) -> tuple[dict[str, str], list[str]]:
    """What is said about the folders of runs and of temporary files, and what is wrong with them."""
    told: dict[str, str] = {}
    trouble: list[str] = []
    temporary = Path(tempfile.gettempdir())
    for what, folder in (("runs", root), ("temporary", temporary)):
        free = shutil.disk_usage(nearest(folder)).free
        told[what] = f"{folder}: {free / 1e9:.1f} GB free{', which is little' if free < _LITTLE_ROOM else ''}"
        try:
            check_writable(folder)
        except StorageError as error:
            trouble.append(str(error))
            told[what] += ", NOT writable"
    together = nearest(root).stat().st_dev == nearest(temporary).stat().st_dev
    told["same device"] = "yes" if together else "no; checkpoints are made beside their final place, so that is fine"
    return told, trouble


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _devices() -> str:
    # Here, because it takes seconds.
    import torch

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{processors} processors, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        return f"{found}; {len(names)} CUDA devices: {', '.join(names)}; CUDA {torch.version.cuda}, NCCL {nccl}"
    if torch.backends.mps.is_available():
        return f"{found}; Apple GPU"
    return f"{found}; no GPU"


def _wandb(environment: Mapping[str, str]) -> str:
    """The mode; whether there is a key is said, the key is not."""
    mode = environment.get("WANDB_MODE", "online")
    # Where the user has no home (a container without an entry in passwd), `~` stays as it is.
    file = Path(os.path.expanduser(environment.get("NETRC", "~/.netrc")))
    try:
        key = "WANDB_API_KEY" in environment or (file.is_file() and "wandb" in file.read_text(errors="replace"))
    except OSError:
        key = False
    return f"{mode} (WANDB_MODE), {'a key is set' if key else 'no key is set'}; used where a configuration asks for it"
