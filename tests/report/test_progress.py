import io
import time

import pytest
import pytorch_lightning as pl
from rich.console import Console

import adaptive_merge as am
from adaptive_merge.callbacks import Diagnostics, History, Progress

OPTIONS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
}


@pytest.fixture
def parts(bank, toy, heads, images):
    """A fresh module and its stream."""
    return lambda: (am.AdaMerging(bank, toy, heads), am.TaskStream(images, images_per_task=4))


def run(parts, terminal, steps, **options):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, legacy_windows=False)
    module, stream = parts()
    trainer = pl.Trainer(max_steps=steps, callbacks=[Progress(console=console, **options)], **OPTIONS)
    trainer.fit(module, stream)
    am.score(trainer, module, stream)
    return text.getvalue()


def test_a_log_file_gets_few_plain_lines(parts):
    text = run(parts, False, 300)
    lines = text.splitlines()
    assert len(lines) == 25 + 4 and max(map(len, lines)) < 100
    assert "\x1b" not in text and "\r" not in text and "Epoch" not in text
    assert lines[0].startswith("step 12/300  loss ") and all(
        word in lines[0] for word in ("entropy", "images/s", "left")
    )
    assert lines[24].startswith("step 300/300") and "took" in lines[24]
    assert lines[25].startswith("scored the pre-trained model: ") and lines[28].startswith("scored the adapted merge: ")


def test_a_thousand_steps_are_at_most_200_lines():
    progress = Progress()
    for steps in (1, 10, 1000, 100_000):
        progress._console = Console(file=io.StringIO())
        trainer = pl.Trainer(max_steps=steps, callbacks=[progress], **OPTIONS)
        progress.on_train_start(trainer, None)
        assert steps / progress._every <= 25


def test_a_terminal_gets_a_bar_that_says_adapting_and_scoring(parts):
    text = run(parts, True, 20, refresh=0.001)
    assert "adapting" in text and "scoring the merge before adaptation" in text and "20/20" in text
    assert "images/s" in text and "Epoch" not in text and "step 20/20" not in text


def test_a_disabled_bar_is_silent(parts):
    text = io.StringIO()
    progress = Progress(console=Console(file=text))
    progress.disable()
    module, stream = parts()
    pl.Trainer(max_steps=3, callbacks=[progress], **OPTIONS).fit(module, stream)
    assert text.getvalue() == ""
    with pytest.raises(am.InputError):
        Progress(lines=0)


def test_watching_costs_little_time(parts, tmp_path):
    """Time inside the callbacks of a step, against a step of 20 ms: far shorter than a real one."""
    module, stream = parts()
    trainer = pl.Trainer(max_steps=200, callbacks=[], enable_progress_bar=False, **OPTIONS)
    trainer.fit(module, stream)
    watching = [History(str(tmp_path)), Progress(console=Console(file=io.StringIO())), Diagnostics(str(tmp_path))]
    for callback in watching:
        callback.setup(trainer, module, "fit")
        callback.on_train_start(trainer, module)
    batch = next(iter(stream.train_dataloader()))
    began = time.thread_time()
    for _ in range(200):
        for callback in watching:
            callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert (time.thread_time() - began) / 200 < 0.02 * 0.02
