"""A stand-in for SLURM on one machine: its commands, as far as a batch script needs them, and one job at a time."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

# One process becomes the task; several are tasks of their own, told what srun is told, and its code is the highest.
_SRUN = """
while [ "${{1#-}}" != "$1" ]; do shift; done
[ "$SLURM_NTASKS" = 1 ] && exec "$@"
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  export SLURM_PROCID=$task
  export SLURM_NODEID=$((task / SLURM_NTASKS_PER_NODE)) SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE))
  "$@" & tasks="$tasks $!"
done
trap 'kill -USR1 $tasks' USR1
highest=0
for task in $tasks; do
  while kill -0 $task 2> /dev/null; do wait $task; code=$?; done
  [ $code -gt $highest ] && highest=$code
done
exit $highest
"""
_TOOLS = {
    "sbatch": 'echo "$@" >> {log}; echo "4242;cluster"',
    "srun": _SRUN,
    "scontrol": 'echo "scontrol $@" >> {log}',
    "adaptive-merge": 'exec {python} -m adaptive_merge "$@"',
}
_TRAINER = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


class Cluster:
    """Tools in a folder of their own, which is first in PATH, and jobs of their scripts.

    Args:
        folder: for tools and their log.
        tools: name → shell line, in place of ours.
    """

    def __init__(self, folder: Path, **tools: str) -> None:
        self.log, self.bin = folder / "slurm.log", folder / "bin"
        self.bin.mkdir()
        for name, line in (_TOOLS | {key.replace("_", "-"): value for key, value in tools.items()}).items():
            path = self.bin / name
            path.write_text(f"#!/bin/sh\n{line.format(log=self.log, python=sys.executable)}\n")
            path.chmod(0o755)
        self.path = f"{self.bin}:{os.environ['PATH']}"

    @property
    def asked(self) -> list[str]:
        """What was said to sbatch and scontrol."""
        return self.log.read_text().splitlines() if self.log.is_file() else []

    def start(self, script: Path, cell: int | None = None, restart: int = 0) -> subprocess.Popen[bytes]:
        """A job of a script, as slurmd would start it: variables and output are as its #SBATCH lines ask."""
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))
        assert asked["signal"].startswith("SIGUSR1@") and "requeue" in asked and asked["open-mode"] == "append"
        variables = _TRAINER | {
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_NNODES": asked["nodes"],
            "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"],
            "SLURM_NTASKS": str(int(asked["nodes"]) * int(asked["ntasks-per-node"])),
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
            "SLURM_NODELIST": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        if restart:
            variables["SLURM_RESTART_COUNT"] = str(restart)
        if cell is not None:
            ranges = [part.split("-") for part in asked["array"].partition("%")[0].split(",")]
            assert any(int(ends[0]) <= cell <= int(ends[-1]) for ends in ranges)
            variables |= {"SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": str(cell), "SLURM_JOB_ID": "4245"}
        output = asked["output"].replace("%j", "4242").replace("%A", "4242").replace("%a", str(cell))
        with open(output, "a") as file:
            environment = os.environ | {"PATH": self.path} | variables
            return subprocess.Popen(["bash", str(script)], stdout=file, stderr=file, env=environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
