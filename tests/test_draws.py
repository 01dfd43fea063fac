import importlib.util
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml

import adaptive_merge as am

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def draws():
    spec = importlib.util.spec_from_file_location("draws", ROOT / "scripts" / "draws.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def taken(recipe):
    """Image draws of a configuration on the embedded suite."""
    config = yaml.safe_load((ROOT / "configs" / "embedded" / f"{recipe}.yaml").read_text())
    data = config.get("data", {})
    tasks = 1 if data.get("schedule") == "shuffled" else 8
    return config["trainer"]["max_steps"] * data.get("images_per_task", 16) * tasks


@pytest.mark.parametrize("recipe", ["adamerging", "tinting_pp"])
def test_fast_variants_and_candidates_keep_to_a_fifth_of_the_draws(draws, recipe):
    assert taken(f"{recipe}_fast") == draws.BUDGET[recipe] == taken(recipe) / 5
    for name in draws.candidates(recipe):
        arguments = draws.arguments_of(name, draws.BUDGET[recipe])
        given = dict(zip(arguments[::2], arguments[1::2]))
        tasks = 1 if given["--data.schedule"] == "shuffled" else 8
        steps, images = int(given["--trainer.max_steps"]), int(given["--data.images_per_task"])
        assert 0 < steps * images * tasks <= draws.BUDGET[recipe]


def test_candidates_are_all_combinations(draws):
    assert draws.candidates("adamerging")[:3] == ["images=4 lr=0.003", "images=4 lr=0.01", "images=8 lr=0.003"]
    assert len(set(draws.candidates("tinting_pp"))) == len(draws.candidates("tinting_pp"))


def test_marks_count_images_and_score_what_the_validation_scores(draws, toy, bank, heads, images):
    module = am.TintingPP(bank, toy, heads)
    stream = am.TaskStream(images, images_per_task=4)
    marks = draws.Marks([1, 12, 30])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=4, callbacks=[marks], **quiet)
    trainer.fit(module, datamodule=stream)
    # 12 images a step: the first step passes the marks 1 and 12, the third 30, the fourth is the end.
    assert [point["draws"] for point in marks.points] == [12, 36, 48]
    trainer.validate(module, datamodule=stream, verbose=False)
    assert marks.points[-1]["accuracy"] == pytest.approx(float(trainer.callback_metrics["adapted/accuracy"]), abs=1e-6)
    assert draws.at(marks.points, 36) == marks.points[1]["accuracy"] and draws.at(marks.points, 30) is None


def test_ranking_is_one_where_the_criterion_orders_as_the_accuracy_does(draws):
    tried = [{"accuracy": 0.1 * n, "agreement": 0.1 * n**2, "js": (n - 1.2) ** 2} for n in (1, 2, 3)]
    assert "agreement 1.00, closeness in JS -1.00" in draws.ranking(tried)
