"""Keys and passwords of the environment and the command line are in no file that a run leaves."""

from processes import start, texts, wait

from adaptive_merge.__main__ import main

SECRETS = {
    "WANDB_API_KEY": "planted0wandb0key",
    "HF_TOKEN": "hf_planted0token",
    "AWS_SECRET_ACCESS_KEY": "planted0aws0secret",
    "MY_PASSWORD": "planted0password",
}
ARGUED = "planted0argument"


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
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        for secret in (*SECRETS.values(), ARGUED):
            assert secret.encode() not in content, f"{secret} in {path}"
