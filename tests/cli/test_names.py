"""What a run is called where nobody says: by recipe and, where they are unusual, protocol and corruption."""

import pytest

from adaptive_merge.cli.fit import AdaptiveMergeCLI

HOLDOUT = ["--data.protocol", "Holdout"]
NOISE = ["--data.corruption", "Corruption", "--data.corruption.kind", "impulse_noise"]
NOISE += ["--data.corruption.severity", "2"]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/quick"),
        (["--data.protocol", "Transductive"], "runs/quick"),
        (HOLDOUT, "runs/quick-holdout"),
        (NOISE, "runs/quick-impulse_noise-2"),
        ([*HOLDOUT, *NOISE], "runs/quick-holdout-impulse_noise-2"),
        ([*HOLDOUT, "--run.name", "mine"], "runs/mine"),
        ([*HOLDOUT, "--run.name", "b32-{recipe}"], "runs/b32-quick-holdout"),
    ],
)
def test_other_protocols_have_other_folders(arguments, folder, tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    text = f"suite: {{name: {suite_folder}}}\nmodel: {{recipe: quick, coefficients: {{class_path: LayerWise}}}}\n"
    cli = AdaptiveMergeCLI(args=["--config", text, *arguments], run=False)
    assert cli.folder.as_posix() == folder
