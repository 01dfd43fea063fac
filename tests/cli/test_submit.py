"""`adaptive-merge submit`: scripts that shells accept, jobs that come back, and what became of each cell."""

import csv
import json
import os
import shlex
import signal
import time
from importlib.util import find_spec

import pytest
import torch
from processes import crowding, start, texts, wait
from shells import accepted
from slurm import Cluster

from adaptive_merge.__main__ import main
from adaptive_merge.cli.slurm import Slurm, batch_script
from adaptive_merge.errors import InputError
from adaptive_merge.process import signals
from adaptive_merge.runs.array import STARTED, last_words, read_array, save_array

CONFIG = """
model:
  recipe: quick
  coefficients: {{class_path: LayerWise, init_args: {{init: 0.3}}}}
trainer: {{max_steps: 50, accelerator: cpu, enable_progress_bar: false}}
data: {{images_per_task: 4}}
suite: {{name: {suite}}}
run: {{report: false, guard: "off"}}
slurm: {{account: merging, gpus: 0, cpus: 1, time: "0:30:00"}}
"""
GRID = ["submit", "--recipes", "quick.yaml", "--seeds", "0,1,2", "--vary", "model.lr=0.01", "--run.name", "sweep"]
CELL = "config=quick.yaml,seed_everything=1,lr=0.01"


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(CONFIG.format(suite=suite_folder))
    return tmp_path


@pytest.fixture
def cluster(work, monkeypatch):
    found = Cluster(work)
    monkeypatch.setenv("PATH", found.path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return found


def printed(capsys, arguments):
    assert main(arguments) == 0
    return accepted(capsys.readouterr().out)


def test_a_dry_run_prints_the_script_of_an_array_and_writes_nothing(work, capsys):
    script = printed(capsys, [*GRID, "--slurm.limit", "3", "--dry-run"])
    for line in (
        "account=merging",
        "time=0:30:00",
        "array=0-2%3",
        "ntasks-per-node=1",
        "output=runs/sweep/slurm-%A_%a.out",
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "gpus" not in script
    cell = next(line for line in script.splitlines() if line.startswith("  1) "))
    found = shlex.split(cell.removeprefix(f"  1) run={CELL}; set -- ").removesuffix(" ;;"))
    assert found == [
        *("--config=quick.yaml", "--seed_everything=1", "--model.lr=0.01"),
        *("--run.root=runs/sweep", f"--run.name={CELL}", "--run.if_exists=resume"),
    ]
    assert {path.name for path in work.iterdir()} == {"quick.yaml"}


def test_one_run_is_a_job_of_its_own(work, capsys):
    script = printed(capsys, ["submit", "--config", "quick.yaml", "--slurm.gpus", "4", "--slurm.nodes=2", "--dry-run"])
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "output=runs/quick/slurm-%j.out"):
        assert f"#SBATCH --{line}\n" in script
    assert "array" not in script and "--slurm" not in script
    assert "set -- --config quick.yaml --run.root=runs --run.name=quick --run.if_exists=resume\n" in script


def test_every_setting_reaches_a_script_that_shells_accept(tmp_path):
    slurm = Slurm(
        account="a", partition="p", qos="q", mem="64G", constraint="a100|h100", modules=["cuda/12.4", "it's"],
        environment={"A": "two words $HOME", "B": 1}, lines=["source ~/merge/bin/activate"], limit=2,
        container="apptainer exec --nv merge.sif", options={"reservation": "spring", "exclusive": True, "x11": False},
    )  # fmt: skip
    script = accepted(
        batch_script(slurm, tmp_path / "runs" / "many", dict.fromkeys(range(6), ["--x", "a b"]), [0, 1, 2, 5])
    )
    for line in ("account=a", "partition=p", "qos=q", "mem=64G", "constraint=a100|h100", "exclusive", "array=0-2,5%2"):
        assert f"#SBATCH --{line}\n" in script
    assert "--reservation=spring" in script and "x11" not in script
    assert "export A='two words $HOME'\nexport B=1\nsource ~/merge/bin/activate\n" in script
    assert "srun --kill-on-bad-exit=0 --wait=60 apptainer exec --nv merge.sif adaptive-merge fit" in script


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--slurm.partiton=x"], "--slurm.partition"),
        (["--slurm.account", "a b"], "sbatch takes no spaces"),
        (["--slurm.constraint", "a\n#SBATCH --uid=0"], "sbatch takes no spaces"),
        (["--slurm.lines", "['a\n\nb']"], "would break the script"),
        (["--slurm.gpus=-1"], "at least 0"),
        (["--slurm.options.time=1"], "use --slurm.time"),
        (["--slurm.options.signal=x"], "resuming"),
        (["--slurm.environment.HF_TOKEN=abc"], "a secret"),
        (["--trainer.logger=WandbLogger", "--trainer.logger.api_key=0123456789"], "a secret"),
        (["--run.if_exists=overwrite"], "would begin anew"),
        (["--run.name=bash"], "choose another"),
        (["--vary", "slurm.gpus=1,2"], "one for all runs"),
        (["--vary", "model.lrr=1"], "--model.lr"),
        (["--model.lr=x"], "model.lr"),
        (["--status", "runs"], "give nothing else"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_submitted(cluster, work, capsys, arguments, told):
    assert main(["submit", "--config", "quick.yaml", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert cluster.asked == [] and not (work / "runs").exists()


def test_fit_takes_the_section_and_keeps_it_out_of_the_run(work, capsys):
    assert main(["fit", "--config", "quick.yaml", "--trainer.max_steps=1", "--slurm.time", "9:00:00"]) == 0
    assert "slurm" not in (work / "runs" / "quick" / "config.yaml").read_text()
    assert (
        main(["fit", "--config", "quick.yaml", "--trainer.max_steps=2", "--run.if_exists=resume", "--slurm.gpus=3"])
        == 0
    )
    assert main(["fit", "--config", "quick.yaml", "--slurm.gpu=3", "--run.name=other"]) == 2
    assert "--slurm.gpus" in capsys.readouterr().err


def learned(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def rows(folder):
    path = folder / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return sum(1 for row in csv.DictReader(file) if (row.get("step") or "").isdigit())


def logged(arguments):
    """With a logger of Weights & Biases, where that is installed."""
    return [*arguments, "--trainer.logger=WandbLogger"] if find_spec("wandb") else arguments


def test_a_preempted_cell_comes_back_to_the_same_bits(cluster, work, capsys):
    assert main(logged(GRID)) == 0
    assert cluster.asked == ["--parsable runs/sweep/submit.sh"] and "job 4242: 3 of 3 to run" in capsys.readouterr().out
    script, cell = work / "runs" / "sweep" / "submit.sh", work / "runs" / "sweep" / CELL
    job = cluster.start(script, cell=1)
    end = time.monotonic() + 90 * crowding()
    while rows(cell) < 3:
        assert time.monotonic() < end and job.poll() is None, (work / "runs" / "sweep" / "slurm-4242_1.out").read_text()
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGUSR1)  # srun tells its processes, of which there is one
    assert job.wait(90 * crowding()) == 75
    assert cluster.asked[1:] == ["scontrol requeue 4242_1"]
    (work / "runs" / "sweep" / CELL.replace("=1", "=2")).write_text("in the way")
    assert cluster.start(script, cell=2).wait(60 * crowding()) == 2
    assert [one.state for one in read_array(work / "runs" / "sweep")] == ["missing", "stopped", "failed"]
    assert 3 <= rows(cell) < 50 and not (cell / "results.json").exists()

    assert cluster.start(script, cell=1, restart=1).wait(120 * crowding()) == 0
    assert [one.state for one in read_array(work / "runs" / "sweep")] == ["missing", "finished", "failed"]
    whole = ["fit", "--config", "quick.yaml", "--seed_everything=1", "--model.lr=0.01", "--run.name=whole"]
    assert wait(start(main, whole, log=work / "whole.log"), 120 * crowding()) == 0, texts(work)
    ours, theirs = learned(cell), learned(work / "runs" / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (cell / "metrics.csv").read_bytes() == (work / "runs" / "whole" / "metrics.csv").read_bytes()

    attempts = [path.name.rpartition("-")[2] for path in (cell / "wandb").glob("offline-run-*")]
    assert len(attempts) == 2 * bool(find_spec("wandb")) and len(set(attempts)) <= 1, "each attempt has one id"

    capsys.readouterr()
    (work / "runs" / "sweep" / CELL.replace("=1", "=2")).unlink()
    assert main([*logged(GRID), "--dry-run"]) == 0
    assert "#SBATCH --array=0,2\n" in capsys.readouterr().out, "what is finished is not started again"
    assert main(["report", "runs/sweep"]) == 0
    told = capsys.readouterr().out
    assert "left out: config=quick.yaml seed_everything=0 model.lr=0.01: missing, never started" in told
    assert "left out: config=quick.yaml seed_everything=2 model.lr=0.01: failed, " in told
    page = (work / "runs" / "sweep" / "report.html").read_text()
    assert "seed_everything=0" in page and "never started" in page


@pytest.mark.slow
def test_a_job_on_two_nodes_comes_back_to_the_same_bits(cluster, work):
    for name in ("two", "whole"):
        assert main(["submit", "--config", "quick.yaml", "--slurm.nodes=2", f"--run.name={name}"]) == 0
    two, whole = (work / "runs" / name for name in ("two", "whole"))
    job = cluster.start(two / "submit.sh")
    end = time.monotonic() + 120 * crowding()
    while rows(two) < 3:
        assert time.monotonic() < end and job.poll() is None, (two / "slurm-4242.out").read_text()
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(90 * crowding()) == 75
    assert cluster.asked[2:] == ["scontrol requeue 4242"], "the first process asks, for all"
    assert cluster.start(two / "submit.sh", restart=1).wait(150 * crowding()) == 0
    assert cluster.start(whole / "submit.sh").wait(150 * crowding()) == 0
    assert (two / "slurm-4242.out").read_text().count("MEMBER: 2/2") == 2, "each start had two processes"
    ours, theirs = learned(two), learned(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("code", "requeued"), [(75, ["scontrol requeue 4242"]), (0, []), (143, [])])
def test_outside_of_a_container_the_script_asks_for_the_queue(tmp_path, code, requeued):
    cluster = Cluster(tmp_path, apptainer=f'test -n "$ADAPTIVE_MERGE_REQUEUE_BY_SCRIPT" && exit {code}')
    script = tmp_path / "submit.sh"
    script.write_text(batch_script(Slurm(container="apptainer exec merge.sif"), tmp_path, {0: []}))
    assert cluster.start(script).wait(20) == code
    assert cluster.asked == requeued


def test_inside_of_it_a_run_leaves_with_the_code_alone(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setenv(signals.BY_SCRIPT, "1")
    assert signals.exit_code(signals.REQUEUE, first=True) == 75


def test_status_tells_the_states_apart(tmp_path, capsys):
    names = ("done", "busy", "starting", "stopped", "failed", "killed", "missing")
    save_array(tmp_path, [(f"lr={name}", name) for name in names])
    mark = [STARTED % ("node7", 0, name) for name in names]
    said = {
        2: f"old words\n{mark[2]}\n",
        3: f"{mark[3]}\nadaptive-merge: told to stop: nothing was saved yet (exit code 75)\nsrun: error: node7: 75\n",
        4: f"{mark[4]}\nadaptive-merge: told to stop\n{mark[4]}\nadaptive-merge: no [such] file\nsrun: error: task 0\n",
        5: f"{mark[5]}\nslurmstepd: error: *** JOB 1 CANCELLED DUE TO TIME LIMIT ***\n",
    }
    for number, words in said.items():
        (tmp_path / f"slurm-9_{number}.out").write_text(words)
    (tmp_path / "slurm-8_4.out").write_text(mark[4])
    os.utime(tmp_path / "slurm-8_4.out", (0, 0))
    for name in ("done", "busy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    (tmp_path / "busy" / ".lock.1").write_text(json.dumps({"host": "node9", "process": 3, "since": "noon"}))
    cells = read_array(tmp_path)
    assert [cell.state for cell in cells] == [
        "finished",
        "running",
        "running",
        "stopped",
        "failed",
        "failed",
        "missing",
    ]
    assert cells[2].note == "starting on node7" and cells[4].note == "no [such] file" and "TIME LIMIT" in cells[5].note
    (tmp_path / "submit.sh").write_text("#SBATCH --array=0-6%2\n")
    assert main(["submit", "--status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "7 cells: 1 finished, 2 running, 1 stopped, 2 failed, 1 missing" in told and "no [such] file" in told
    assert f"sbatch --array=4,5,6%2 {tmp_path}/submit.sh" in told


def test_a_log_is_of_the_run_that_it_names(tmp_path):
    (tmp_path / "slurm-9_0.out").write_text(f"{STARTED % ('node7', 0, 'seed=0')}\nCUDA out of memory\n")
    (tmp_path / "slurm-9_3.out").write_text("no module cuda/12.4\n")
    save_array(tmp_path, [(name, name) for name in ("seed=5", "seed=0", "seed=1", "seed=2")])
    assert [(cell.state, cell.note) for cell in read_array(tmp_path)] == [
        ("missing", "never started"),
        ("failed", "CUDA out of memory"),
        ("missing", "never started"),
        ("failed", "no module cuda/12.4"),
    ]


def test_a_job_that_was_cancelled_does_not_come_back_by_itself(tmp_path):
    save_array(tmp_path, [("a", "a")])
    said = "adaptive-merge: told to stop: what it learned is in last.ckpt; resume goes on from it (exit code 143)\n"
    (tmp_path / "slurm-9_0.out").write_text(f"{STARTED % ('node7', 0, 'a')}\n{said}")
    assert [cell.state for cell in read_array(tmp_path)] == ["failed"]


def test_cells_that_ask_for_other_machines_are_no_array(work, capsys):
    text = (work / "quick.yaml").read_text()
    (work / "other.yaml").write_text(text.replace("gpus: 0", "gpus: 4"))
    assert main(["submit", "--recipes", "quick.yaml,other.yaml", "--run.name", "two", "--dry-run"]) == 2
    assert "slurm: config=other.yaml asks for something else than config=quick.yaml" in capsys.readouterr().err
    printed(capsys, ["submit", "--recipes", "quick.yaml,other.yaml", "--slurm.gpus=2", "--run.name=two", "--dry-run"])


def test_a_run_has_the_name_that_fit_would_give_it(work, capsys):
    script = printed(capsys, ["submit", "--config", "quick.yaml", "--data.protocol", "Holdout", "--dry-run"])
    assert "--run.name=quick-holdout " in script and f"#SBATCH --chdir={work}\n" in script
    arguments = ["submit", "--config", "quick.yaml", "--seeds", "0", "--data.protocol", "Holdout", "--dry-run"]
    assert "--run.root=runs/quick-holdout-array " in printed(capsys, arguments)


def test_a_folder_without_an_array_has_no_status(tmp_path, capsys):
    assert main(["submit", "--status", str(tmp_path)]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_the_last_words_are_not_those_of_srun():
    assert last_words("Traceback\nValueError: x\nsrun: error: task 0\n") == "ValueError: x"
    assert last_words("a\nadaptive-merge: b\nsrun: c") == "b" and last_words("srun: d") == "srun: d"


def test_an_array_cannot_name_folders_outside_of_it(tmp_path):
    save_array(tmp_path, [("x", "../x")])
    with pytest.raises(InputError, match="not a list of cells"):
        read_array(tmp_path)


def test_a_script_of_somebody_else_is_left_alone(cluster, work, capsys):
    (work / "runs" / "sweep").mkdir(parents=True)
    (work / "runs" / "sweep" / "submit.sh").write_text("mine")
    assert main(GRID) == 2 and cluster.asked == []
    assert "was not written by this program" in capsys.readouterr().err


def test_what_sbatch_says_is_told(work, monkeypatch, capsys):
    monkeypatch.setenv("PATH", Cluster(work, sbatch="echo bad partition >&2; exit 1").path)
    assert main(["submit", "--config", "quick.yaml"]) == 2
    assert "ended with 1: bad partition" in capsys.readouterr().err
