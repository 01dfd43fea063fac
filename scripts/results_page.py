"""The tables and the figure of docs/results.md, from the runs that `reproduce.py` has left and from the page itself.

A table is read back from the page by the names of its columns, so that rows whose runs are not here stay, and a column
that is new to them says so in words.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from functools import cache

import yaml
from reproduce import CONFIGS, PROTOCOLS, ROOT, RUNS, STAGED, TWENTY, UNSEEN, methods
from results_figures import pareto

from adaptive_merge.report.compare import Group, difference
from adaptive_merge.report.summary import probability
from adaptive_merge.runs.measures import normalised
from adaptive_merge.runs.reading import Run, read_run

PAGE = ROOT / "docs" / "results.md"
Cells = dict[str, str]

# Method → published mean on CLIP ViT-B/32, eight tasks, task_vectors checkpoints, where there is one.
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
REFERENCES = {"pre-trained": ("pretrained", 48.0), "individual experts": ("individual", 90.5)}
NOT_RECORDED = "not recorded"
NOTHING = ("", "–", NOT_RECORDED)
BEST = "the best"
README = ("holdout", "transductive")  # in the order of its columns


@cache
def load(protocol: str, method: str) -> Group:
    """The finished runs of a method."""
    paths = sorted((RUNS / protocol).glob(f"{method}-[0-9]*/results.json"))
    return Group(method, [read_run(path.parent) for path in paths])


def tables() -> dict[str, dict[str, Cells]]:
    """Protocol → method → cells by column: of the runs, or as the page has them."""
    made = {}
    for protocol in PROTOCOLS:
        known, floor = on_page(protocol), load(protocol, "task_arithmetic")
        rows = {name: known[name] for name in REFERENCES if name in known}
        if floor.runs:
            rows = {name: reference(protocol, name, floor.runs[0]) for name in REFERENCES}
        for method in methods():
            if load(protocol, method).runs and floor.runs:
                rows[method] = measured(protocol, method, floor)
            elif method in known:
                rows[method] = known[method]
        for method, cells in rows.items():
            published = PUBLISHED.get(method)
            cells.setdefault("published, ViT-B/32", f"{published:.1f}" if published else "not published")
            if protocol == "unseen":
                lost = number(rows["pre-trained"]["unseen tasks, %"]) - number(cells["unseen tasks, %"])
                cells.setdefault("forgotten", f"{lost:.1f}")
        made[protocol] = tested(protocol, rows, known)
    return made


def measured(protocol: str, method: str, floor: Group) -> Cells:
    """The row of a method whose runs are here."""
    group = load(protocol, method)
    runs, first = group.runs, group.runs[0].results
    stopped = sum(bool(run.results["guard"].get("stopped")) for run in runs)
    name = f"[`{method}`](../configs/embedded/{method}.yaml)" + f" ({stopped} stopped by the guard)" * bool(stopped)
    lowest = [min((row["adapted"], task) for task, row in run.merged.items()) for run in runs]
    cells = {
        "method": name,
        "mean accuracy, %": spread([100 * value for value in group.values()]),
        "normalised, %": spread([100 * normalised(run.merged, "adapted")["mean_of_ratios"] for run in runs]),
        "gap closed": f"{closed(group, floor):.0f} %",
        "worst task": f"{100 * min(lowest)[0]:.1f} ({min(lowest)[1]})",
        "worst task vs its merge": f"{min(100 * worst_gain(run) for run in runs):+.1f}",
        "ECE": spread([100 * run.calibration_error("adapted") for run in runs]),
        "seeds": str(len(runs)),
        "images": f"{images(runs):,}",
        "draws": f"{draws(protocol, method, runs[0]):,}",
        "steps": f"{first['steps']:,}",
        "learned numbers": f"{first['trainable_parameters']:,}" if first["steps"] else "0",
        "seconds": f"{statistics.median(map(seconds, runs)):.0f}",
        "CPU seconds of the run": processor(protocol, method),
        "peak MiB": f"{max(run.results['peak_memory_bytes'] for run in runs) / 2**20:,.0f}",
    }
    if protocol == "unseen":
        unseen = [run.results["unseen"]["average"] for run in runs]
        cells["unseen tasks, %"] = spread([100 * row["adapted"] for row in unseen])
        cells["forgotten"] = spread([100 * (row["pretrained"] - row["adapted"]) for row in unseen])
    return cells


def reference(protocol: str, name: str, run: Run) -> Cells:
    """The row of a model that no merge is."""
    view, published = REFERENCES[name]
    floor, top = (run.results["average"][one] for one in ("adapted", "individual"))
    lowest = min((row[view], task) for task, row in run.merged.items())
    value = run.results["average"][view]
    cells = {
        "method": name,
        "mean accuracy, %": f"{100 * value:.1f}",
        "normalised, %": f"{100 * normalised(run.merged, view)['mean_of_ratios']:.1f}",
        "gap closed": f"{100 * (value - floor) / (top - floor):.0f} %",
        "worst task": f"{100 * lowest[0]:.1f} ({lowest[1]})",
        "worst task vs its merge": "no merge",
        "ECE": f"{100 * run.calibration_error(view):.1f}",
        "p against the best": "not a merge",
        "published, ViT-B/32": f"{published:.1f}",
    } | dict.fromkeys(("images", "draws", "steps", "learned numbers", "seconds"), "0")
    if protocol == "unseen":
        unseen = run.results["unseen"]["average"]
        cells |= {"unseen tasks, %": f"{100 * unseen[view]:.1f}"}
        cells["forgotten"] = f"{100 * (unseen['pretrained'] - unseen[view]):.1f}"
    return cells | dict.fromkeys(("seeds", "CPU seconds of the run", "peak MiB"), "not a run")


def tested(protocol: str, rows: dict[str, Cells], known: Mapping[str, Cells]) -> dict[str, Cells]:
    """The rows with p against the best method of the table: paired over images, with the seeds' variance.

    Between rows whose runs are not both here nothing is tested; what the page says against the same best stays.
    """
    named = {method: cells for method, cells in rows.items() if method not in REFERENCES}
    groups = {method: load(protocol, method) for method in named}
    if not any(group.runs for group in groups.values()):
        return rows
    best = max(named, key=lambda method: number(named[method]["mean accuracy, %"]))
    same = known.get(best, {}).get("p against the best") == BEST
    for method, cells in named.items():
        if method == best:
            cells["p against the best"] = BEST
        elif groups[best].runs and groups[method].runs:
            test = difference(groups[best], groups[method])
            cells["p against the best"] = f"{probability(test.p)}{'' if test.paired else ', binomial'}"
        elif groups[method].runs or not same:
            cells["p against the best"] = NOT_RECORDED
    return rows


def closed(group: Group, floor: Group) -> float:
    """Percent of the gap between task arithmetic at 0.3 and the individual experts that is closed."""
    low, top = floor.spread[0], group.runs[0].results["average"]["individual"]
    return 100 * (group.spread[0] - low) / (top - low)


def worst_gain(run: Run) -> float:
    return min(row["adapted"] - row.get("anchor", row["initial"]) for row in run.tasks.values())


def images(runs: list[Run]) -> int:
    """How many different images of all tasks a run adapts on, those of its start included."""
    return round(statistics.mean(sum(run.results["protocol"]["adapted_on"].values()) for run in runs))


def draws(protocol: str, method: str, run: Run) -> int:
    """How many images the steps are shown, repeats counted."""
    if protocol == "online":
        return images([run]) if run.results["steps"] else 0
    data = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text()).get("data", {})
    merged = len(run.results["tasks"]) - len(UNSEEN if protocol == "unseen" else ())
    tasks = 1 if data.get("schedule") == "shuffled" else merged
    return run.results["steps"] * data.get("images_per_task", 16) * tasks


def seconds(run: Run) -> float:
    """Of steps and start, on one thread, as the clock had them; a transform is solved while the experts load."""
    began = (run.results["start"] or {}).get("seconds", 0.0)
    return run.results["seconds"]["adapt"] if run.results["steps"] else began


def processor(protocol: str, method: str) -> str:
    """Median CPU seconds of the whole process: loading, adapting, scoring five views."""
    paths = sorted((RUNS / protocol).glob(f"{method}-[0-9]*/cost.json"))
    values = [json.loads(path.read_text())["cpu_seconds"] for path in paths]
    return f"{statistics.median(values):.0f}" if values else NOT_RECORDED


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def columns(protocol: str) -> list[str]:
    """The names of a table's columns."""
    names = ["method", "mean accuracy, %", "normalised, %", "p against the best", "gap closed", "worst task"]
    names += ["worst task vs its merge", "ECE", "seeds", "images", "draws", "steps", "learned numbers", "seconds"]
    names += ["CPU seconds of the run", "peak MiB"] + ["published, ViT-B/32"] * (protocol == "transductive")
    if protocol == "unseen":
        names[2:2] = ["unseen tasks, %", "forgotten"]
    return names


def markdown(names: list[str], rows: list[Cells], missing: Callable[[Cells, str], str]) -> str:
    """A table; what a row has no cell for is said in words."""
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get(name, "").strip() for name in names]
        cells = [missing(row, name) if cell in ("", "–") else cell for name, cell in zip(names, cells)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(made: Mapping[str, Mapping[str, Cells]]) -> str:
    """Mean accuracy of each method under each protocol."""
    rows = []
    for name in (*REFERENCES, *methods()):
        cells = {protocol: made[protocol][name]["mean accuracy, %"] for protocol in made if name in made[protocol]}
        rows.append({"method": name if name in REFERENCES else f"`{name}`"} | cells)
    return markdown(["method", *PROTOCOLS], rows, absent)


def absent(row: Cells, protocol: str) -> str:
    """Why a method has no number under a protocol."""
    method = row["method"].strip("`")
    if protocol == "online" and method in STAGED:
        return "longer than a pass"
    if protocol not in ("transductive", "holdout") and method not in TWENTY:
        return "not of the twenty"
    return "not run yet"


def axes(made: Mapping[str, Mapping[str, Cells]]) -> str:
    """MergeBench's: the merged tasks, what is forgotten of the others, time and memory."""
    rows = []
    for method in (*REFERENCES, *methods()):
        held, unseen = (made[protocol].get(method, {}) for protocol in ("holdout", "unseen"))
        if held:
            kept = {name: held.get(name, "") for name in ("method", "images", "seconds", "peak MiB", "normalised, %")}
            rows.append(kept | {"merged tasks, %": held["mean accuracy, %"], "forgotten": unseen.get("forgotten", "")})
    names = ["method", "merged tasks, %", "normalised, %", "forgotten", "images", "seconds", "peak MiB"]

    def missing(row: Cells, name: str) -> str:
        method = re.sub(r"\[?`(\w+)`.*", r"\1", row["method"])
        return absent({"method": method}, "unseen") if name == "forgotten" else NOT_RECORDED

    return markdown(names, rows, missing)


def on_page(name: str) -> dict[str, Cells]:
    """Method → cells by column, of a table that the page has."""
    lines = [line.strip("| ").split(" | ") for line in between(name).splitlines() if line.startswith("| ")]
    lines = [[cell.strip() for cell in line] for line in lines]
    rows = [{name: cell for name, cell in zip(lines[0], line) if cell not in NOTHING} for line in lines[1:]]
    return {re.sub(r"\[?`(\w+)`.*", r"\1", row["method"]): row for row in rows}


def between(name: str) -> str:
    """What lies between the page's marks of this name."""
    start, end = marks(name)
    return PAGE.read_text().partition(start)[2].partition(end)[0]


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python scripts/reproduce.py -->", f"<!-- end of {name} -->"


def write(name: str, content: str) -> None:
    """Replace what lies between the page's marks of this name."""
    page, (start, end) = PAGE.read_text(), marks(name)
    before, rest = page.split(start)
    PAGE.write_text(f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}")


def readme(made: Mapping[str, Mapping[str, Cells]], text: str) -> str:
    """README with the mean accuracies of these tables in its table of methods and in its first one."""

    def row(found: re.Match[str]) -> str:
        cells = found[0].split(" | ")
        name = cells[0].strip("| ").partition(" (")[0].strip("`")
        means = {protocol: made[protocol].get(name, {}).get("mean accuracy, %") for protocol in README}
        if len(cells) == 5:
            cells[2:4] = [means[protocol] or old for protocol, old in zip(README, cells[2:4])]
        elif len(cells) == 3 and means["holdout"]:
            cells[2] = means["holdout"].partition(" ")[0] + " |"
        return " | ".join(cells)

    return re.sub(r"^\| (`\w+`|pre-trained|individual experts).*$", row, text, flags=re.MULTILINE)


def write_page() -> str:
    """Every table and the figure, those of README among them; the overview."""
    made = tables()
    for protocol, rows in made.items():
        write(protocol, markdown(columns(protocol), list(rows.values()), lambda row, name: NOT_RECORDED))
    write("axes", axes(made))
    write("overview", overview(made))
    start = ROOT / "README.md"
    start.write_text(readme(made, start.read_text()))
    points = {
        method: {name: number(cells.get(name, "")) for name in ("mean accuracy, %", "images", "seconds")}
        for method, cells in made["holdout"].items()
        if method not in REFERENCES
    }
    pareto(points, ROOT / "docs" / "images" / "pareto.png")
    return overview(made)


def number(cell: str) -> float:
    """The first number of a cell; NaN where it is in words."""
    found = re.match(r"-?[\d.,]+", cell)
    return float(found[0].replace(",", "")) if found else float("nan")
