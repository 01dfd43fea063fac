"""Run every recipe on the embedded suite, by protocol and seed, and write tables and figures of docs/results.md.

    python scripts/reproduce.py                                   # the whole plan, see `PLAN`
    python scripts/reproduce.py --protocol holdout --seeds 0      # a part of it
    python scripts/reproduce.py --protocol corrupted --methods adamerging surgery_ta tinting_pp
    python scripts/reproduce.py --tables                          # run nothing, write page and figures anew

Runs go to runs/reproduce/<protocol>/<method>-<seed>; one that has its results.json is not run again, so that an
interrupted call goes on where it stopped. Rows of the tables whose runs are not there stay as the page has them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "embedded"
RUNS = ROOT / "runs" / "reproduce"

FIRST = ("weight_averaging", "task_arithmetic", "ties", "adamerging_task", "adamerging_pp_task", "adamerging")
STAGED = ("surgery_adamerging",)  # its first stage is longer than a single pass

QUICK_DIAGNOSTICS = '[{"class_path": "adaptive_merge.callbacks.Diagnostics", "init_args": {"cross": false}}]'

UNSEEN = ("digits", "thai")

# Protocol → what it adds to the command line.
PROTOCOLS: dict[str, list[str]] = {
    "transductive": [],
    "holdout": ["--data.protocol", "Holdout"],
    "online": ["--data.protocol", "Online", "--data.images_per_task", "4"],
    "unseen": ["--data.protocol", "Unseen", "--data.protocol.tasks", f"[{','.join(UNSEEN)}]"],
    "corrupted": ["--data.corruption", "Corruption", "--data.corruption.kind", "impulse_noise"]
    + ["--data.corruption.severity", "2"],
}
# The twenty that matter: what each family begins with, and what is best in it.
TWENTY = (
    *("weight_averaging", "task_arithmetic", "ties", "tsvm", "adamerging_task", "adamerging_pp_task", "adamerging"),
    *("adamerging_pp", "surgery_avg", "surgery_ta", "surgery_adamerging", "surgery_v2", "tinting", "tinting_pp"),
    *("symerge", "best", "soft_adamerging", "start", "start_adamerging", "start_best"),
)


def methods() -> list[str]:
    """What ships, in the order of the tables."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return [*FIRST, *(name for name in names if name not in FIRST)]


def plan(protocol: str) -> tuple[list[str], list[int]]:
    """Recipes and seeds of the whole plan: all with three seeds held out, all transductive, the twenty elsewhere."""
    names = methods() if protocol in ("transductive", "holdout") else list(TWENTY)
    return names, [0, 1, 2] if protocol == "holdout" else [0]


def has_seeds(method: str) -> bool:
    """Whether anything random is in it: steps, or the images of a start. Else one seed says all."""
    settings = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())
    return settings["trainer"]["max_steps"] > 0 or "start" in settings["model"]


def folder_of(protocol: str, method: str, seed: int) -> Path:
    return RUNS / protocol / f"{method}-{seed}"


def cache_of(protocol: str, run: str) -> Path:
    """What experts say about an image is the same in all runs; what a frozen merge says is not."""
    images = "corrupted" if protocol == "corrupted" else "clean"
    frozen = "surgery" in run and "surgery_v2" not in run
    return RUNS / "cache" / images / (f"{protocol}-{run}" if frozen else "experts")


def run(protocol: str, method: str, seed: int) -> bool:
    """One run, in a process of its own with one thread, so that two do not fight over cores; whether it is there."""
    folder = folder_of(protocol, method, seed)
    if (folder / "results.json").is_file():
        return True
    command = [sys.executable, "-m", "adaptive_merge", "fit", "--config", str(CONFIGS / f"{method}.yaml")]
    command += ["--seed_everything", str(seed), "--run.root", str(folder.parent), "--run.name", folder.name]
    command += ["--run.if_exists", "overwrite", "--run.report", "false", "--trainer.enable_progress_bar", "false"]
    command += ["--model.cache", str(cache_of(protocol, folder.name)), "--trainer.callbacks", QUICK_DIAGNOSTICS]
    command += PROTOCOLS[protocol]
    code, processor, output = timed(command)
    ended = code == 4 and (folder / "results.json").is_file()  # by the guard, and the results say so
    if code and not ended:
        print(f"{protocol}, {method}, seed {seed}, ended with {code}:\n{output}", file=sys.stderr, flush=True)
        return False
    (folder / "cost.json").write_text(json.dumps({"cpu_seconds": round(processor, 1)}))
    print(f"{protocol}, seed {seed}\n{output}", flush=True)
    return True


def timed(command: list[str]) -> tuple[int, float, str]:
    """Exit code, CPU seconds of the whole process, and what it said."""
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return process.returncode, used.ru_utime + used.ru_stime, output.read()


def jobs(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """What is asked for, the first seeds first; each protocol with the merge that its gaps are measured from."""
    wanted = []
    for protocol in options.protocol:
        names, seeds = plan(protocol)
        for method in dict.fromkeys(["task_arithmetic", *(options.methods or names)]):
            own = options.seeds or seeds
            wanted += [(protocol, method, seed) for seed in (own if has_seeds(method) else own[:1])]
    possible = [job for job in wanted if not (job[0] == "online" and job[1] in STAGED)]
    return sorted(possible, key=lambda job: job[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=methods(), help="default: those of the plan")
    parser.add_argument("--protocol", nargs="*", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--seeds", nargs="*", type=int, help="default: those of the plan")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tables", action="store_true", help="only write page and figures from what is there")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        there = list(pool.map(lambda job: run(*job), [] if options.tables else jobs(options)))
    # Here, because it takes seconds that runs do not need.
    from results_page import write_page

    print(write_page())
    if not all(there):
        sys.exit(f"{there.count(False)} of {len(there)} runs failed, see above; what they said is in their folders")


if __name__ == "__main__":
    main()
