"""`adaptive-merge plan`: what it says is what a run does, and of experts it reads headers alone."""

import json
import resource
import shutil
import struct
import subprocess
import sys

import pytest
from fitting import QUICK
from planning import SMALL, TINY, measured_peaks, write_clip_suite

from adaptive_merge.__main__ import main

# Transforms, adapters, stages; a route; a rule that keeps factors; a start.
RECIPES = (
    *(f"clip/{name}" for name in ("adamerging", "adamerging_pp", "tinting_pp", "surgery_adamerging", "wemoe")),
    *("spectral_soft", "start_adamerging"),
)
KINDS = ("resident", "streamed", "sharded")


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + QUICK)
    return tmp_path


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """A suite whose experts are full of NaN, which reading them would meet."""
    folder = write_clip_suite(tmp_path_factory.mktemp("stubs"), 4, TINY)
    for index in range(4):
        path = folder / f"task{index}.safetensors"
        content = path.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        path.write_bytes(content[:start] + struct.pack("<f", float("nan")) * ((len(content) - start) // 4))
    return folder


@pytest.fixture
def planned(capsys):
    def plan(*arguments):
        capsys.readouterr()
        assert main(["plan", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return plan


def test_what_would_be_written_is_what_a_run_writes(work, planned):
    plan = planned("--config", "quick.yaml")
    assert not (work / "runs").exists()
    assert main(["fit", "--config", "quick.yaml"]) == 0
    results = json.loads((work / "runs/quick/results.json").read_text())
    written = {str(path.relative_to(work)) for path in (work / "runs/quick").rglob("*") if path.is_file()}
    assert set(plan["files"]) == {path for path in written if "/." not in path}
    assert (plan["steps"], plan["experts"], plan["learned"]) == (3, 3, results["trainable_parameters"])
    assert {task: row["images"] for task, row in plan["tasks"].items()} == {
        task: row["n"] for task, row in results["tasks"].items()
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.lrr=1", "--model.lr"),
        ("--trainer.precision=16-true", "--trainer.precision"),
        ("--trainer.max_steps=-1", "nothing ends this run"),
        ("--model.coefficients=Fixed", "nothing to learn"),
        ("--suite.tasks=[grean]", "did you mean 'green'"),
        ("--data.protocol={class_path: Unseen, init_args: {tasks: [grey]}}", "grey"),
    ],
)
def test_what_fit_would_refuse_is_refused(work, capsys, option, message):
    assert main(["plan", "--config", "quick.yaml", option]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_there_is_told(work, capsys):
    assert main(["fit", "--config", "quick.yaml", "--trainer.max_steps=1", "--run.report=false"]) == 0
    assert main(["plan", "--config", "quick.yaml"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_task_that_cannot_be_used_is_a_row_and_an_exit_code(work, capsys, suite_folder):
    shutil.copytree(suite_folder, work / "suite")
    (work / "suite/images/green.npz").unlink()
    assert main(["plan", "--json", "--config", "quick.yaml", "--suite.name=suite"]) == 2
    out, err = capsys.readouterr()
    rows = json.loads(out)["tasks"]
    assert [bool(row["problem"]) for row in rows.values()] == [False, True, False] and "green" in err


def test_no_number_of_an_expert_is_read_and_memory_follows_what_is_asked(stubs, planned, tmp_path):
    options = ["--config", "clip/adamerging", "--suite.name", str(stubs), "--run.root", str(tmp_path / "runs")]
    options += ["--trainer.accelerator=gpu"]
    plan = planned(*options)
    device = {kind: plan["memory"][kind]["device"] for kind in KINDS}
    bank = 4 * 5 * plan["parameters"]
    assert plan["device"] == "accelerator" and device["resident"]["bank"] == bank
    assert plan["memory"]["resident"]["host"]["bank"] == bank
    halves = planned(*options, "--processes=2")["memory"]
    assert halves["sharded"]["device"]["bank"] == bank // 2 and halves["resident"]["device"]["bank"] == bank
    assert halves["resident"]["device"]["activations"] < 0.7 * device["resident"]["activations"]
    one = planned(*options, "--model.accumulate=per_task")
    assert (plan["step"]["graph"], one["step"]["graph"]) == ("joint", "per_task")
    assert one["memory"]["resident"]["device"]["activations"] < 0.5 * device["resident"]["activations"]
    frozen = planned(*options, "--config", "clip/surgery_ta")
    scoring = [run["memory"]["resident"]["device"]["evaluation"] for run in (plan, one, frozen)]
    tower = 4 * plan["parameters"]
    # The buffer of the last step, a merge and an expert; or two merges, an expert and adapters.
    assert scoring[0] == scoring[1] >= 3 * tower and scoring[2] >= 3 * tower
    assert planned(*options, "--suite.dtype=bfloat16")["memory"]["resident"]["device"]["bank"] == bank * 3 // 5


def test_a_rule_that_looks_at_its_numbers_has_a_stand_in(stubs, planned, tmp_path):
    options = ["--config", "adarank", "--suite.name", str(stubs), "--run.root", str(tmp_path / "runs")]
    fixed = ["--model.coefficients.init_args.trainable=false", "--trainer.max_steps=0"]
    learned, still = planned(*options), planned(*options, *fixed)
    assert learned["step"]["exact"] is still["step"]["exact"] is False
    rule, again = (plan["memory"]["resident"]["device"]["rule"] for plan in (learned, still))
    assert rule == again > 0


def test_the_transforms_bank_that_a_start_replaces_is_gone_before_the_first_step(stubs, planned, tmp_path):
    options = ["--config", "start_adamerging", "--suite.name", str(stubs), "--run.root", str(tmp_path / "runs")]
    memory = planned(*options, "--trainer.accelerator=cpu")["memory"]["resident"]
    device, host = memory["device"], memory["host"]
    step = sum(device[key] for key in ("towers", "gradients", "activations", "state"))
    assert memory["total"] == step + sum(host.values()) - host["transformed"] and host["transformed"] > 0


def test_a_probe_takes_steps_and_leaves_no_run(work, planned):
    probe = planned("--config", "quick.yaml", "--probe=2")["probe"]
    assert probe["steps"] == 3 and probe["seconds"] == pytest.approx(3 * probe["seconds_per_step"])
    assert not (work / "runs").exists()


def _peaks(folder, recipe, planned, kinds):
    small, tiny = (write_clip_suite(folder / name, 4, kind) for name, kind in (("small", SMALL), ("tiny", TINY)))

    def options(suite, kind):
        own = ["--suite.name", str(suite), "--model.bank", kind, "--run.name", f"{suite.name}-{kind}"]
        fixed = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--run.report=false"]
        return ["--config", recipe, "--run.root", str(folder / "runs"), *own, *fixed]

    plan = planned(*options(small, kinds[0]))
    measured = measured_peaks(options(tiny, kinds[0]), *(options(small, kind) for kind in kinds))
    return [plan["memory"][kind]["total"] for kind in kinds], measured


def test_planned_memory_is_near_the_measured_peak(tmp_path, planned):
    expected, measured = _peaks(tmp_path, "clip/adamerging", planned, ["streamed"])
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three whole runs and what plans them
@pytest.mark.parametrize("recipe", RECIPES)
def test_planned_memory_is_near_the_measured_peak_of_every_placement(tmp_path, planned, recipe, record_property):
    expected, measured = _peaks(tmp_path, recipe, planned, KINDS)
    for kind, *pair in zip(KINDS, expected, measured):
        record_property(kind, " / ".join(f"{size / 1e6:.0f}" for size in pair))
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_twenty_large_towers_are_planned_by_their_headers(tmp_path, record_property):
    suite = write_clip_suite(tmp_path / "suite", 20, "ViT-L-14")
    options = ["--config", "clip/adamerging", "--config", "clip/vit_l_14/20tasks", "--suite.name", str(suite)]
    options += ["--run.root", str(tmp_path / "runs"), "--processes=8", "--trainer.accelerator=gpu"]
    command = [sys.executable, "-m", "adaptive_merge", "plan", "--json", *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    plan = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record_property("CPU seconds", f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f}")
    assert (plan["experts"], plan["parameters"], plan["step"]["exact"]) == (20, 303_966_208, True)
    assert plan["memory"]["sharded"]["device"]["bank"] == 4 * 21 * plan["parameters"] // 8
