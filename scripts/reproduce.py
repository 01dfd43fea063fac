"""Run every method on the embedded suite, by protocol and seed, and write the tables of docs/results.md.

    python scripts/reproduce.py                                   # transductive, all methods, seeds 0 1 2
    python scripts/reproduce.py --protocol holdout online unseen  # the other protocols
    python scripts/reproduce.py --protocol corrupted --methods adamerging surgery_ta tinting_pp
    python scripts/reproduce.py --methods tinting best --seeds 0
    python scripts/reproduce.py --tables                          # run nothing, write the tables anew

Runs go to runs/reproduce/<protocol>/<method>-<seed>; one that has its results.json is not run again, so that an
interrupted call goes on where it stopped. Rows of the tables whose runs are not there stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "embedded"
RUNS = ROOT / "runs" / "reproduce"
PAGE = ROOT / "docs" / "results.md"

# Method → published mean on CLIP ViT-B/32, eight tasks, task_vectors checkpoints, where there is one. Methods that are
# not named here come after these, by name.
PUBLISHED: dict[str, float] = {
    "weight_averaging": 65.8,
    "task_arithmetic": 69.1,
    "ties": 72.4,
    "adamerging_task": 71.1,
    "adamerging_pp_task": 73.8,
    "adamerging": 80.2,
    "adamerging_pp": 81.1,
    "surgery_avg": 80.0,  # of an average without DTD
    "surgery_ta": 80.9,
    "surgery_adamerging": 86.1,
}
FIRST = ("weight_averaging", "task_arithmetic", "ties", "adamerging_task", "adamerging_pp_task", "adamerging")
STAGED = ("surgery_adamerging",)  # its first stage is longer than a single pass
REFERENCES = {"pretrained": ("pre-trained", 48.0), "individual": ("individual experts", 90.5)}

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


def methods() -> list[str]:
    """What ships, in the order of the tables."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return [*FIRST, *(name for name in names if name not in FIRST)]


def has_seeds(method: str) -> bool:
    """Whether anything random is in it: steps, or the images of a start. Else one seed says all."""
    settings = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())
    return settings["trainer"]["max_steps"] > 0 or "start" in settings["model"]


def folder_of(protocol: str, method: str, seed: int) -> Path:
    return RUNS / protocol / f"{method}-{seed}"


def cache_of(protocol: str, run: str) -> Path:
    """What experts say about an image is the same in all runs; what a frozen merge says is not."""
    images = "corrupted" if protocol == "corrupted" else "clean"
    frozen = run.startswith("surgery_") and not run.startswith("surgery_v2")
    return RUNS / "cache" / images / (f"{protocol}-{run}" if frozen else "experts")


def run(protocol: str, method: str, seed: int) -> None:
    """One run, in a process of its own with one thread, so that two at a time do not fight over the cores."""
    folder = folder_of(protocol, method, seed)
    if (folder / "results.json").is_file():
        return
    command = [sys.executable, "-m", "adaptive_merge", "fit", "--config", str(CONFIGS / f"{method}.yaml")]
    command += ["--seed_everything", str(seed), "--run.root", str(folder.parent), "--run.name", folder.name]
    command += ["--run.if_exists", "overwrite", "--run.report", "false", "--trainer.enable_progress_bar", "false"]
    command += ["--model.cache", str(cache_of(protocol, folder.name)), "--trainer.callbacks", QUICK_DIAGNOSTICS]
    command += PROTOCOLS[protocol]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    ended = done.returncode == 4 and (folder / "results.json").is_file()  # by the guard, and the results say so
    if done.returncode and not ended:
        raise SystemExit(f"{protocol}, {method}, seed {seed}, ended with {done.returncode}:\n{done.stderr}")
    print(f"{protocol}, seed {seed}\n{done.stdout}", flush=True)


def load(protocol: str, method: str) -> list[dict]:
    """The results of a method's finished runs."""
    found = sorted((RUNS / protocol).glob(f"{method}-[0-9]*/results.json"))
    return [json.loads(path.read_text()) for path in found]


def row(protocol: str, method: str) -> str | None:
    results = load(protocol, method)
    if not results:
        return None
    averages = [100 * result["average"]["adapted"] for result in results]
    worst = min(
        100 * (row["adapted"] - row.get("anchor", row["initial"]))
        for result in results
        for row in result["tasks"].values()
    )
    steps, published = results[0]["steps"], PUBLISHED.get(method)
    stopped = sum(bool(result["guard"].get("stopped")) for result in results)
    cells = [
        f"[`{method}`](../configs/embedded/{method}.yaml)" + (f" ({stopped} stopped by the guard)" if stopped else ""),
        spread(averages),
        f"{recovered(protocol, results):.0f} %",
        f"{worst:+.1f}",
        f"{statistics.mean(ece(result, 'adapted') for result in results):.1f}",
        str(len(results)),
        f"{images(results):,}",
        f"{draws(protocol, method, results[0]):,}",
        f"{steps:,}",
        f"{results[0]['trainable_parameters']:,}" if steps else "0",
        f"{statistics.median(map(seconds, results)):.0f}",
    ]
    if protocol == "transductive":
        cells.append(f"{published:.1f}" if published else "–")
    if protocol == "unseen":
        cells.insert(2, spread([100 * result["unseen"]["average"]["adapted"] for result in results]))
    return "| " + " | ".join(cells) + " |"


def images(results: list[dict]) -> int:
    """How many different images of all tasks a run adapts on, those of its start included."""
    return round(statistics.mean(sum(result["protocol"]["adapted_on"].values()) for result in results))


def draws(protocol: str, method: str, result: dict) -> int:
    """How many images the steps are shown, repeats counted."""
    if protocol == "online":
        return images([result]) if result["steps"] else 0
    data = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text()).get("data", {})
    tasks = (
        1 if data.get("schedule") == "shuffled" else len(result["tasks"]) - len(UNSEEN if protocol == "unseen" else ())
    )
    return result["steps"] * data.get("images_per_task", 16) * tasks


def seconds(result: dict) -> float:
    """CPU seconds of steps and start; a transform is solved while the experts load."""
    if result["steps"]:
        return result["seconds"]["adapt"]
    return result["start"]["seconds"] if "start" in result else 0.0


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def ece(result: dict, view: str) -> float:
    """Mean expected calibration error over the merged tasks, in percentage points."""
    left_out = result.get("unseen", {}).get("tasks", [])
    return 100 * statistics.mean(value for task, value in result["calibration"][view].items() if task not in left_out)


def recovered(protocol: str, results: list[dict]) -> float:
    """Percent of the gap between task arithmetic at 0.3 and the individual experts that is closed."""
    floor = load(protocol, "task_arithmetic")[0]["average"]["adapted"]
    individual = results[0]["average"]["individual"]
    mean = statistics.mean(result["average"]["adapted"] for result in results)
    return 100 * (mean - floor) / (individual - floor)


def table(protocol: str) -> str:
    """The Markdown table of a protocol's finished runs."""
    known = load(protocol, "task_arithmetic")
    if not known:
        return between(protocol).strip()
    head = [
        "method",
        "mean accuracy, %",
        "gap closed",
        "worst task vs its merge",
        "ECE",
        "seeds",
        "images",
        "draws",
        "steps",
    ]
    head += ["learned numbers", "seconds"] + (["published, ViT-B/32"] if protocol == "transductive" else [])
    if protocol == "unseen":
        head.insert(2, "unseen tasks, %")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for view, (name, published) in REFERENCES.items():
        cells = [""] * len(head)
        cells[0], cells[1] = name, f"{100 * known[0]['average'][view]:.1f}"
        cells[head.index("ECE")] = f"{ece(known[0], view):.1f}"
        if protocol == "transductive":
            cells[-1] = f"{published:.1f}"
        if protocol == "unseen":
            cells[2] = f"{100 * known[0]['unseen']['average'][view]:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    rows = [row(protocol, method) or kept(protocol, method) for method in methods()]
    return "\n".join(lines + [line for line in rows if line])


def kept(name: str, method: str) -> str | None:
    """The line that the page has of a method whose runs are not here."""
    lines = between(name).splitlines()
    return next((line for line in lines if re.match(rf"\| \[?`{re.escape(method)}`", line)), None)


def between(name: str) -> str:
    """What lies between the page's marks of this name."""
    start, end = marks(name)
    return PAGE.read_text().partition(start)[2].partition(end)[0]


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python scripts/reproduce.py -->", f"<!-- end of {name} -->"


def overview() -> str:
    """Mean accuracy of each method under each protocol; cells whose runs are not here stay as the page has them."""
    lines = ["| method | " + " | ".join(PROTOCOLS) + " |", "|" + "---|" * (len(PROTOCOLS) + 1)]
    lines += [line for line in between("overview").splitlines() if re.match(r"\| (pre-trained|individual)", line)]
    for method in methods():
        before = (kept("overview", method) or "").strip("| ").split(" | ")[1:] or ["–"] * len(PROTOCOLS)
        values = [[100 * one["average"]["adapted"] for one in load(protocol, method)] for protocol in PROTOCOLS]
        cells = [spread(found) if found else old for found, old in zip(values, before)]
        if set(cells) != {"–"}:
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(name: str, content: str) -> None:
    """Replace what lies between the page's marks of this name."""
    page, (start, end) = PAGE.read_text(), marks(name)
    before, rest = page.split(start)
    PAGE.write_text(f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=methods(), default=methods())
    parser.add_argument("--protocol", nargs="*", choices=PROTOCOLS, default=["transductive"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    wanted = dict.fromkeys(["task_arithmetic", *options.methods])
    jobs = [
        (protocol, method, seed)
        for seed in options.seeds
        for protocol in options.protocol
        for method in wanted
        if (has_seeds(method) or seed == options.seeds[0]) and not (protocol == "online" and method in STAGED)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: run(*job), [] if options.tables else jobs))
    for protocol in PROTOCOLS:
        write(protocol, table(protocol))
    write("overview", overview())
    print(overview())


if __name__ == "__main__":
    main()
