"""Every block of README and documentation runs as it stands, on a small cut of the embedded suite, for two steps.

Figures of reports are laid out and not drawn, which would be half of the time; tests/report draws them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from blocks import ROOT, Page, blocks
from matplotlib.figure import Figure

from adaptive_merge.__main__ import main
from adaptive_merge.cli import tune
from adaptive_merge.suites import loading

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "configs/clip/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
IMAGES, STEPS = 12, 2


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The embedded suite with 12 images of each task and split; everything else is as it ships."""
    folder = tmp_path_factory.mktemp("cut") / "embedded"
    shutil.copytree(loading.EMBEDDED, folder)
    manifest = json.loads((folder / "suite.json").read_text())
    for path in (folder / "images").glob("*.npz"):
        arrays = {name: array[:IMAGES] for name, array in np.load(path).items()}
        np.savez(path, **arrays)
        manifest["files"][f"images/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "suite.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def page(cut, tmp_path, monkeypatch):
    """A runner in a clean folder where nothing takes long: few images and steps, no figures, `tune` in this process."""

    train = pl.Trainer.fit

    @functools.wraps(train)  # the command line reads its arguments
    def fit(self, *args, **kwargs):
        if self.max_steps > STEPS:
            self.fit_loop.epoch_loop.max_steps = STEPS
        return train(self, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **settings: file.write('<svg viewBox="0 0 4 3"></svg>'))
    monkeypatch.setattr(loading, "EMBEDDED", cut)
    monkeypatch.setattr(tune, "_fit", in_process)
    for name in ("CLIP_CHECKPOINTS", "CLIP_DATA"):
        monkeypatch.setenv(name, "")  # what a block exports is gone after the page
    for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)  # and so does what the loggers put there
    monkeypatch.chdir(tmp_path)
    yield Page(monkeypatch)
    if wandb := sys.modules.get("wandb"):
        wandb.finish()  # a process that is forked later would take the run for its own


def in_process(arguments, log):
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    return main(["fit", *arguments])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_order(path, page, record_property):
    found = blocks(path)
    for block in found:
        page.run(block)
    record_property("blocks", dict(Counter(block.kind for block in found)))


def test_most_blocks_are_executed():
    """What is only parsed or shown says why by its mark, or is a program's output, and stays the smaller part."""
    kinds = Counter(block.kind for path in PAGES for block in blocks(path))
    assert set(kinds) <= {"executed", "parsed", "fragment", "shown"}
    assert kinds["executed"] > 2 * (kinds["parsed"] + kinds["fragment"])


@pytest.mark.parametrize(
    "text",
    [
        "```python\nimport no_such_package\n```",
        "```\nadaptive-merge fit --config adamergin\n```",
        "```\nadaptive-merge inspect runs/never\n```",
        "<!-- block: parsed, no GPU -->\n```\nadaptive-merge fit --config adamerging --trainer.device 1\n```",
        "<!-- block: parsed, minutes -->\n```\npython scripts/starts.py --foldr runs\n```",
        "<!-- block: parsed, network -->\n```\npip install 'adaptive_merge[reports]'\n```",
        "```yaml\nmodel: {lrr: 0.1}\n```",
        "```\nbash scripts/demonstration.sh\n```",
    ],
)
def test_a_block_that_is_wrong_fails(text, page, tmp_path, monkeypatch):
    monkeypatch.setattr("blocks.ROOT", ROOT)
    wrong = Path(tmp_path / "page.md")
    wrong.write_text(text)
    monkeypatch.setattr("blocks.place", str)
    (block,) = blocks(wrong)
    with pytest.raises((Exception, SystemExit)):
        page.run(block)


def test_a_fence_that_stays_open_is_found(tmp_path):
    (tmp_path / "page.md").write_text("```\nadaptive-merge recipes\n")
    with pytest.raises(AssertionError, match="not closed"):
        blocks(tmp_path / "page.md")
