"""Keys and passwords of the environment and the command line are in no file that a run leaves."""

import json
import os
import time

import pytest
from processes import start, texts, wait

from adaptive_merge.__main__ import main

SECRETS = {
    "WANDB_API_KEY": "planted0wandb0key",
    "HF_TOKEN": "hf_planted0token",
    "AWS_SECRET_ACCESS_KEY": "planted0aws0secret",
    "MY_PASSWORD": "planted0password",
}
ARGUED = "planted0argument"
CONFIGURED = "planted0configured"


def fit(arguments):
    return main(["fit", *arguments])


def test_planted_secrets_are_in_no_file(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    arguments = [
        f"--suite.name={suite_folder}",
        "--model.recipe=quick",
        "--model.coefficients=LayerWise",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=boards",
        "--trainer.logger.name=run",
    ]
    # A token that is handed on from the environment, to an option that takes it.
    handed_on = [*arguments, f"--trainer.logger.dict_kwargs.comment={SECRETS['HF_TOKEN']}"]
    assert wait(start(fit, handed_on, log=tmp_path / "run.log", environment=SECRETS), 90) == 0, texts(tmp_path)
    # One that stands on the command line alone, for an option that nobody knows: the message does not repeat it.
    unknown = [*arguments, "--run.name=argued", f"--trainer.logger.dict_kwargs.api_key={ARGUED}"]
    wait(start(fit, unknown, log=tmp_path / "argued.log", environment=SECRETS), 90)
    assert len(searched(tmp_path)) > 5


def searched(folder):
    """All files below a folder, in none of which a secret is found, as text or as the bytes of wider characters."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for secret in (*SECRETS.values(), ARGUED, CONFIGURED):
            for coding in ("utf-8", "utf-16-le"):
                assert secret.encode(coding) not in content, f"{secret} in {path}"
    return files


def fit_and_finish(arguments):
    """What a process of its own does: wandb closes its files when the interpreter ends, which a fork does not."""
    import wandb

    code = fit(arguments)
    wandb.finish()
    return code


def test_planted_secrets_are_in_no_file_of_wandb(tmp_path, monkeypatch, suite_folder):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    # Hyper-parameters: what the user hands to wandb's own record of the run, by a telling name and by value.
    settings = {"hf_token": CONFIGURED, "note": f"uses {SECRETS['HF_TOKEN']}", "url": f"https://me:{ARGUED}@host/x"}
    arguments = [
        f"--suite.name={suite_folder}",
        "--model.recipe=quick",
        "--model.coefficients=LayerWise",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.logger=WandbLogger",
        "--trainer.logger.project=merging",
        f"--trainer.logger.config={json.dumps(settings)}",
        f"--trainer.logger.notes=with {SECRETS['MY_PASSWORD']}",
        f"--trainer.logger.tags=[{SECRETS['AWS_SECRET_ACCESS_KEY']}]",
    ]
    environment = {**SECRETS, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    assert wait(start(fit_and_finish, arguments, log=tmp_path / "run.log", environment=environment), 90) == 0, texts(
        tmp_path
    )
    names = {path.name for path in searched(tmp_path)}
    assert {"config.yaml", "metrics.csv", "results.json", "report.html", "last.ckpt", "wandb.json", "run.log"} <= names
    (path,) = (tmp_path / "runs" / "quick" / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 30
    # wandb's own process closes the file a moment after `finish` has returned.
    while b"train/loss" not in (record := path.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    searched(path.parent)
    assert b"train/loss" in record and b"(hidden)" in record, "nothing was hidden: the test proves nothing"
