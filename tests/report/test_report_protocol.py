"""The report tells protocol, selection, guard, calibration and criteria, and compares only what is alike."""

import json
import re

import numpy as np
import pytest
from sample_runs import HOSTILE, change, write_run

import adaptive_merge as am
from adaptive_merge.report.compare import alike, contrasts, group_runs
from adaptive_merge.report.html import write_report
from adaptive_merge.report.sections import run_sections
from adaptive_merge.report.summary import cards, gap_closed, warnings_of
from adaptive_merge.report.terms import alarms, choice, sentence, terms
from adaptive_merge.runs.reading import read_run

TASKS = ("mnist", "fashion", "kmnist")
NEW = ("protocol", "calibration", "criteria", "guard")
ORACLE = {"select": "oracle", "kept_step": 40, "checks": 3, "warnings": [], "stopped": None}
EVIL = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def words_only(monkeypatch):
    """A run's own figures take seconds, and the tests of them draw them by `panels_of`."""
    monkeypatch.setattr("adaptive_merge.report.html._DETAILED", 0)


def panels_of(run):
    return [panel for section in run_sections(run, "x") for panel in section.panels]


def page_of(*folders):
    return write_report(folders, folders[0].parent / "page.html").read_text()


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>", 1)[1].split("<script>")[0]))


def with_protocol(folder, name, settings="", corruption="", **numbers):
    protocol = {"name": name, "adapted_on": dict.fromkeys(TASKS, 250), "scored_on": dict.fromkeys(TASKS, 250)}
    with (folder / "config.yaml").open("a") as file:
        kind = f"{{class_path: adaptive_merge.X, init_args: {{{settings}}}}}"
        file.write(f"data: {{protocol: {kind}, corruption: {corruption or 'null'}}}\n")
    return change(folder, protocol=protocol | numbers)


def unseen_run(folder):
    """The last task was not merged, and is the only one that lost."""
    content = json.loads((write_run(folder) / "results.json").read_text())
    content["tasks"]["kmnist"] |= {"initial": 0.3, "adapted": 0.1}
    content["unseen"] = {"tasks": ["kmnist"], "average": content["tasks"]["kmnist"]}
    content["calibration"]["adapted"] = {"mnist": 0.1, "fashion": 0.2, "kmnist": 0.9}
    change(folder, **content)
    return with_protocol(folder, "unseen", "tasks: [kmnist]", adapted_on={"mnist": 9, "fashion": 9, "kmnist": 0})


def online_run(folder):
    write_run(folder)
    one = {"accuracy": 0.7, "images": [100, 300, 500], "curve": [0.5, 0.6, 0.7], "predicted": 480}
    tasks = {task: one | {"curve": [0.5, 0.6, 0.7 + 0.01 * place]} for place, task in enumerate(TASKS)}
    return with_protocol(change(folder, online={"final": dict.fromkeys(TASKS, 0.8), "tasks": tasks}), "online")


def test_protocol_images_calibration_and_criteria_are_named(tmp_path):
    folder = with_protocol(write_run(tmp_path / "run"), "holdout", "share: 0.5, seed: 7")
    run = read_run(folder)
    assert sentence(run) == "Protocol holdout: adapted on 750 images, scored on 750 (share 0.5, seed 7)."
    shown = {card.name: card for card in cards(run)}
    assert shown["protocol"].value == "holdout" and "never adapted on" in shown["protocol"].note
    text = text_of(page_of(folder))
    for words in (sentence(run), "calibration error (ECE) 12.5 %", "71.0 %", "0.164", "The last step, 60, was kept."):
        assert words in text
    assert "ORACLE" not in text and "never saw a label" in text and run.notes == []


def test_means_are_over_the_merged_tasks_and_unseen_ones_stand_apart(tmp_path):
    folder = unseen_run(tmp_path / "run")
    run = read_run(folder)
    assert list(run.merged) == ["mnist", "fashion"]
    for view in ("initial", "adapted"):
        assert run.results["average"][view] == pytest.approx(np.mean([run.tasks[t][view] for t in run.merged]))
    assert run.results["unseen"]["average"]["adapted"] == 0.1 and run.calibration_error("adapted") == pytest.approx(
        0.15
    )
    assert gap_closed(run) == pytest.approx(np.mean([(run.tasks[t]["adapted"] - 0.6) / 0.35 for t in run.merged]))
    told = {card.name: card for card in cards(run)}
    assert told["on unseen tasks"].value == "10.0 %" and told["adapted accuracy"].note.startswith("mean of 2 tasks, ± ")
    assert any(warning.startswith("unseen: kmnist: adaptation lost 20.0") for warning in warnings_of(run))
    page = page_of(folder)
    assert "average of the unseen tasks" in page and re.search(r"kmnist</bdi> <span[^>]*>unseen", page)
    panels = panels_of(run)
    drawn, titles = " ".join(panel.svg for panel in panels), [panel.title for panel in panels]
    assert "unseen: kmnist" in drawn and "unseen: mnist" not in drawn and not run.notes
    # Most room would be there, but it was not merged.
    assert any(title.startswith("PCA of the features of") and "kmnist" not in title for title in titles)


def test_online_shows_the_prequential_curve_and_says_so(tmp_path):
    folder = online_run(tmp_path / "run")
    for name in ("metrics.csv", "history.safetensors", "diagnostics.safetensors"):
        (folder / name).unlink()
    run = read_run(folder)
    assert "each predicted before it was used" in sentence(run)
    assert {card.name: card for card in cards(run)}["adapted accuracy"].note.startswith("prequential mean of 3 tasks")
    [panel] = [panel for panel in panels_of(run) if "Prequential" in panel.title]
    assert "71.0 % on average" in panel.caption and "reaches 80.0 %" in panel.caption
    assert "No step predicted 60 of the images" in panel.caption
    assert "images of the stream" in panel.svg and "mean of the pass 71.0 %" in panel.svg and "mnist" in panel.svg
    assert "not to the predictions on the way" in page_of(folder)


def test_a_choice_by_labels_is_marked_everywhere(tmp_path):
    oracle = change(write_run(tmp_path / "chosen", better=0.2), guard=ORACLE)
    run = read_run(oracle)
    page = page_of(oracle)
    assert re.search(r"<title>chosen · ORACLE", page) and "<h1><bdi>chosen · ORACLE" in page
    assert "never saw a label" not in page and 'class="alarm"' in page
    assert alarms(run) == ["ORACLE: labels chose the step that was kept: not a label-free result."]
    assert cards(run)[0].value == "ORACLE" and choice(run).startswith("Step 40 was kept: labels chose it")
    plain = write_run(tmp_path / "plain")
    groups = group_runs([run, read_run(plain)])
    assert [group.name for group in groups][1].startswith("ORACLE ") and contrasts(groups) == []
    several = page_of(oracle, plain)
    assert "2 runs · 1 ORACLE" in several and "best, protocol transductive, ORACLE" in several
    rows = re.search(r'id="all-runs".*?</table>', several, re.S)[0]
    assert rows.count("ORACLE") == 2 and "chosen · ORACLE" in several


def test_a_stop_of_the_guard_is_told_with_its_reason(tmp_path):
    folder = write_run(tmp_path / "run")
    stopped = {"step": 35, "reason": f"task '{EVIL}': crowds", "restored_step": 10}
    warnings = [
        {"step": step, "task": task, "signal": signal, "value": 0.5}
        for step, task, signal in (
            (25, "mnist", "marginal"),
            (30, "mnist", "marginal"),
            (30, EVIL, "marginal"),
            (35, None, "agreement"),
        )
    ]
    change(
        folder, guard=ORACLE | {"select": "last", "warnings": warnings, "stopped": stopped, "kept_step": 10}, steps=35
    )
    run = read_run(folder)
    [alarm] = alarms(run)
    assert "at step 35" in alarm and "crowds" in alarm and "set back to step 10" in alarm and choice(run) == ""
    first, second = warnings_of(run)[:2]
    assert "crowd into few classes: mnist from step 25, 2 times; " in first and "from step 30, once" in first
    assert "experts' class: all tasks together from step 35, once" in second
    page = page_of(folder)
    assert 'role="alert"' in page and page.count("<script") == 1 and "&lt;script&gt;" in page
    both = page_of(folder, write_run(tmp_path / "other", seed=1))
    assert "stopped by the guard at step 35" in both


@pytest.mark.parametrize("select", ["agreement", "js", "entropy"])
def test_a_choice_without_labels_says_what_chose(tmp_path, select):
    run = read_run(change(write_run(tmp_path / "run"), guard=ORACLE | {"select": select}))
    assert choice(run).startswith("Step 40 was kept") and "No label had a part" in choice(run) and alarms(run) == []


def test_runs_of_before_protocols_still_have_a_report(tmp_path):
    folder = change(write_run(tmp_path / "old"), **dict.fromkeys(NEW))
    page = page_of(folder)
    assert "The protocol was not recorded" in page
    assert any(card.value == "not recorded" for card in cards(read_run(folder)))
    assert "calibration error (ECE)" not in page and len(panels_of(read_run(folder))) == 18
    assert "not recorded" in page_of(folder, write_run(tmp_path / "new"))


def test_only_runs_on_one_protocol_are_grouped_and_tested(tmp_path):
    runs = [write_run(tmp_path / f"{recipe}{seed}", seed=seed, recipe=recipe) for recipe in "ab" for seed in range(3)]
    runs += [
        with_protocol(write_run(tmp_path / f"held{seed}", seed=seed, recipe="a", better=0.1), "holdout", "share: 0.5")
        for seed in range(3)
    ]
    runs += [with_protocol(write_run(tmp_path / "held, other", recipe="a"), "holdout", "share: 0.2")]
    runs += [with_protocol(write_run(tmp_path / "noisy", recipe="a"), "transductive", corruption="{kind: noise}")]
    groups = group_runs([read_run(folder) for folder in runs])
    assert sorted(len(group.runs) for group in groups) == [1, 1, 3, 3, 3]
    assert len(alike(groups)) == 4 and len({group.name for group in groups}) == 5
    [one] = contrasts(groups)
    assert one.terms == "transductive" and one.seeds == 3
    text = text_of(page_of(*runs))
    assert "Protocols differ" in text and "best, protocol holdout, share 0.5" in text and "best method" not in text
    assert "transductive, images corrupted by kind noise" in text and "12.5 %" in text and "71.0 %" in text
    assert "Adapted accuracy per task, protocol holdout, share 0.2" in text


def test_a_stopped_run_stays_with_its_other_seeds(tmp_path):
    runs = [write_run(tmp_path / f"run{seed}", seed=seed) for seed in range(2)]
    for folder in runs:
        with (folder / "config.yaml").open("a") as file:
            file.write("trainer: {max_steps: 60}\n")
    change(runs[1], steps=35)
    assert len(group_runs([read_run(folder) for folder in runs])) == 1


def test_what_the_guard_logs_is_drawn_as_dots_at_its_looks(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.curve("js", "mnist")[0].tolist() == [19, 39, 59]
    panels = {panel.title: panel.svg for panel in panels_of(run)}
    for title in (
        "Agreement with the expert",
        "Divergence from the expert",
        "Marginal entropy",
        "Length of the features",
    ):
        assert panels[title].count("<use") >= 9
    assert panels["Normalised entropy"].count("<use") < panels["Marginal entropy"].count("<use")


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": {"name": "online"}},
        {"protocol": []},
        {"unseen": {"tasks": ["no such task"]}},
        {"unseen": {"tasks": list(TASKS)}},
        {"online": {"final": {}, "tasks": {}}},
        {"calibration": {"adapted": {"mnist": "x"}}},
        {"guard": {"stopped": {"step": 3}}},
        {"guard": {"warnings": [{"step": 1}]}},
    ],
)
def test_damaged_records_are_refused(tmp_path, fields):
    with pytest.raises(am.InputError, match="not results of this version"):
        read_run(change(write_run(tmp_path / "run"), **fields))


def test_hostile_words_of_the_new_fields_are_escaped(tmp_path):
    folder = with_protocol(
        write_run(tmp_path / "run", HOSTILE),
        "</title>" + EVIL,
        f"note: '{EVIL}'",
        adapted_on=dict.fromkeys(HOSTILE, 1),
        scored_on=dict.fromkeys(HOSTILE, 1),
    )
    other = change(write_run(tmp_path / "other"), guard=ORACLE)
    for page in (page_of(folder), page_of(folder, other)):
        assert page.count("<script") == 1 and page.count("</title") == 1 and "&lt;script&gt;alert(1)" in page
    assert "note" in terms(read_run(folder))
