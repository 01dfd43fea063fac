"""The guard sees a collapse without labels, gives back the best state, and leaves healthy runs alone."""

import logging
import math

import pytest
import pytorch_lightning as pl
import torch
from processes import QUIET
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader

import adaptive_merge as am
from adaptive_merge.callbacks.guard.collapse import Signals, judge, sums
from adaptive_merge.callbacks.guard.guard import Guard
from adaptive_merge.callbacks.guard.watch import Watch
from adaptive_merge.callbacks.safe.ranks import Ranks
from adaptive_merge.data.protocols import Online
from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Prediction
from adaptive_merge.objectives.functional import normalised_entropy

FINE = Signals(images=32, agreement=0.8, js=0.1, entropy=0.3, norm=1.0, marginal=0.9, expert_marginal=0.95)
NO_SCORING = {"limit_val_batches": 0}


class Steer(pl.Callback):
    """Put the coefficients where they are wanted: step → value, from then on."""

    def __init__(self, values):
        self.values = values

    def on_train_batch_end(self, trainer, module, *_):
        known = [step for step in self.values if step <= trainer.global_step]
        with torch.no_grad():
            module.coefficients.values.fill_(self.values[max(known)]) if known else None


class Memory(Logger):
    """What was logged: step → names."""

    name, version = "memory", "0"

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)


def train(module, data, steps=20, callbacks=(), source=None, **settings):
    data = am.TaskStream(data, 8) if isinstance(data, dict) else data
    trainer = pl.Trainer(max_steps=steps, callbacks=list(callbacks), **QUIET | NO_SCORING | settings)
    trainer.fit(module, datamodule=data, ckpt_path=source, weights_only=True)
    return trainer


def changed(**values):
    return Signals(**FINE.__dict__ | values)


def judged(**values):
    """(signal, task, whether it ends the run) of two tasks, the second of which has changed."""
    now = {"fine": FINE, "other": changed(**values)}
    return {(alarm.signal, alarm.task, alarm.stop) for alarm in judge(now, dict.fromkeys(now, FINE), None)}


def test_a_class_beyond_what_the_expert_gives_is_named():
    expert = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    ours = torch.tensor([[0.0, 0, 9], [0, 0, 9], [0, 0, 9], [9, 0, 0]])
    features = torch.ones(4, 2)
    seen = Signals.of(sums(Prediction(features, ours), Prediction(features, expert), 5), 3)
    assert seen.crowd == 2
    assert seen.excess == pytest.approx(float((ours.softmax(1) - expert.softmax(1)).mean(0)[2]), abs=1e-6)
    (alarm,) = judge({"a": seen}, {"a": seen}, None)
    assert "class 2 has 50% more of its predictions than the expert" in str(alarm)


@pytest.mark.parametrize(
    ("values", "alarms"),
    [
        ({"excess": 0.39, "crowd": 3}, set()),
        ({"excess": 0.5, "crowd": 3}, {("class", "other", False)}),
        ({"excess": 0.5, "marginal": 0.6}, {("marginal", "other", False)}),
        ({}, set()),
        ({"agreement": 0.72}, set()),  # 4 points in the mean
        ({"agreement": 0.69}, {("agreement", None, False)}),
        ({"agreement": 0.3}, {("agreement", None, True)}),
        ({"marginal": 0.6}, {("marginal", "other", False)}),
        ({"marginal": 0.2}, {("marginal", "other", True)}),
        ({"marginal": 0.6, "agreement": 0.6}, {("marginal", "other", True), ("agreement", None, False)}),
        ({"norm": 2.1}, {("norm", "other", False)}),
        ({"norm": 0.2}, {("norm", "other", False)}),  # heads look at the direction only
        ({"norm": 5.0, "agreement": 0.6}, {("norm", "other", True), ("agreement", None, False)}),
        ({"norm": math.nan, "marginal": math.nan}, {("norm", "other", False), ("marginal", "other", True)}),
    ],
)
def test_what_counts_as_a_collapse(values, alarms):
    assert judged(**values) == alarms


def test_few_images_say_less():
    """Of 20 images in all, a loss of 20 points is chance."""
    for images, stop in ((10, False), (100, True)):
        now = {task: changed(images=images, agreement=0.6) for task in "ab"}
        (alarm,) = judge(now, dict.fromkeys(now, FINE), None)
        assert alarm.stop is stop


def test_a_task_whose_images_are_of_one_class_is_not_a_collapse():
    start = changed(marginal=0.9, expert_marginal=0.1)
    assert judge({"a": changed(marginal=0.02)}, {"a": start}, None) == []
    assert judge({"a": changed(marginal=0.45)}, {"a": changed(expert_marginal=0.5)}, None) == []


@pytest.mark.parametrize(
    ("values", "first", "alarms"),
    [
        ((-0.4, 1.4), (0.3, 0.3), set()),
        ((0.0, 2.0), (0.3, 0.3), {("coefficients", False)}),
        ((0.0, 2.0), (0.0, 2.5), set()),
        ((-3.0, 2.0), (0.3, 0.3), {("coefficients", False)}),
        ((math.nan, math.nan), (0.3, 0.3), {("coefficients", False)}),
    ],
)
def test_coefficients_alone_are_a_warning(values, first, alarms):
    for now in ({}, {"a": FINE}):
        assert {(alarm.signal, alarm.stop) for alarm in judge(now, {"a": FINE}, values, first)} == alarms


def test_coefficients_that_run_away_while_agreement_is_lost():
    now, start = {"a": changed(agreement=0.74)}, {"a": FINE}
    assert any(alarm.stop for alarm in judge(now, start, (-2.5, 1.0), (0.3, 0.3)))
    assert not any(alarm.stop for alarm in judge(now, start, (-1.5, 1.0), (0.3, 0.3)))


def test_sums_of_processes_add_up_to_the_signals_of_all_images():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 9, 4, generator=generator)
    features, targets = torch.randn(2, 9, 6, generator=generator)
    cuts = [0, 2, 2, 9]
    parts = [slice(*ends) for ends in zip(cuts, cuts[1:])]
    total = sum(
        sums(Prediction(features[part], ours[part]), Prediction(targets[part], theirs[part]), width=5) for part in parts
    )
    found = Signals.of(total, 4)
    assert found.images == 9
    assert found.agreement == pytest.approx((ours.argmax(1) == theirs.argmax(1)).float().mean().item())
    assert found.entropy == pytest.approx(normalised_entropy(ours).item(), abs=1e-6)
    assert found.norm == pytest.approx((features.norm(dim=1).mean() / targets.norm(dim=1).mean()).item(), abs=1e-6)
    mean = torch.distributions.Categorical(probs=theirs.softmax(1).mean(0))
    assert found.expert_marginal == pytest.approx(mean.entropy().item() / math.log(4), abs=1e-6)


RECIPES = {
    "adamerging, joint": lambda *parts: am.AdaMerging(*parts, accumulate="joint", lr=0.01),
    "adamerging, per task": lambda *parts: am.AdaMerging(*parts, accumulate="per_task", lr=0.01),
    "surgery": lambda *parts: am.Surgery(*parts, rank=2, lr=0.01),
    "tinted layer": lambda *parts: am.TintingPP(*parts, layer="proj"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_guarded_run_learns_the_same_bits(recipe, toy, bank, heads, images):
    learned, drawn = [], []
    for guards in ([], [Guard(every=2, images=8, on_collapse="warn")]):
        torch.manual_seed(5)
        module = RECIPES[recipe](bank, toy, heads)
        train(module, images, 7, guards)
        assert module.training
        learned.append([value.detach().clone() for value in module.learned])
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert all(torch.equal(*pair) for pair in zip(*learned))


@pytest.mark.parametrize("recipe", RECIPES)
def test_signals_are_those_of_the_model_on_the_watched_images(recipe, toy, bank, heads, images):
    module = RECIPES[recipe](bank, toy, heads)
    trainer = train(module, images, 4)
    now, start = Watch(module, Ranks(), 9).compare(trainer, module)
    for task, source in images.items():
        index = trainer.datamodule.watched(task, 9, 4)
        seen = source.take(index)
        with torch.no_grad():
            expert = module.model(task, seen, bank.expert(task), adapted=False)
            for view, found in (("adapted", now), ("initial", start)):
                weights = module.views.weights(view, task)
                said = module.model(task, seen, weights, adapted=view == "adapted")
                exact = Signals.of(sums(said, expert, 5), len(heads[task]))
                assert found[task].__dict__ == pytest.approx(exact.__dict__, abs=1e-5)


def test_a_frozen_tower_is_not_run_again(toy, bank, heads, images, monkeypatch):
    module = am.Surgery(bank, toy, heads, rank=2)
    watch = Watch(module, Ranks(), 9)
    trainer = train(module, images, 2)
    watch.compare(trainer, module)
    monkeypatch.setattr(module.model.backbone, "forward", None)
    watch.compare(trainer, module)


def test_a_collapse_is_stopped_and_the_best_state_comes_back(toy, bank, heads, images, caplog):
    for source in images.values():
        del source.labels  # nothing that looks at them can work
    module = am.AdaMerging(bank, toy, heads, bounds="free", lr=1e-4)
    start = module.coefficients.values.detach().clone()
    guard = Guard(every=6, images=20)
    with caplog.at_level(logging.WARNING, "adaptive_merge"):
        trainer = train(module, images, 100, [Steer({9: -9.0}), guard])
    record = guard.record()
    assert trainer.global_step == 22  # fine at 6, looked at again 5 steps after 12 and 17
    assert guard.stopped and record["stopped"]["step"] == 22 and record["checks"] == 4
    back = record["stopped"]["restored_step"]
    assert back in (0, 6) and record["kept_step"] == back
    assert (module.coefficients.values - start).abs().max() <= 6 * 1e-4 * 1.01
    assert torch.equal(module.coefficients.values, start) == (back == 0)
    assert {warning["signal"] for warning in record["warnings"]} >= {"agreement", "coefficients"}
    assert sum("stopped at step 22" in text for text in caplog.messages) == 1


def test_on_collapse_warn_goes_on(toy, bank, heads, images):
    module, guard = am.AdaMerging(bank, toy, heads, bounds="free", lr=1e-4), Guard(6, 20, on_collapse="warn")
    trainer = train(module, images, 40, [Steer({3: -9.0}), guard])
    assert trainer.global_step == 40 and not guard.stopped and guard.record()["warnings"]
    assert guard.record()["checks"] == 7  # at 6, 11, 16, then every 6 steps again, and at the end
    assert (module.coefficients.values == -9.0).all()


def test_adamerging_at_a_learning_rate_of_0_3_is_stopped():
    suite = am.load_suite("embedded", split="val")
    module = am.AdaMerging(suite.task_vectors, suite.backbone, suite.heads, lr=0.3, bounds="free")
    start, guard = module.coefficients.values.detach().clone(), Guard(every=25)
    trainer = train(module, am.TaskStream(suite.images, 4), 50, [guard])
    assert guard.stopped and trainer.global_step < 50
    assert torch.equal(module.coefficients.values, start)


def test_the_state_to_keep(toy, bank, heads, images):
    """The best of the states that were looked at, collapsed ones aside, as measured afterwards."""
    values, kept = {1: 0.1, 4: 0.6, 7: 0.25, 10: 0.0, 13: 0.9}, {}
    looks = dict.fromkeys((0, 3, 6, 9, 12, 15))
    for select in ("last", "agreement", "js", "entropy"):
        module, guard = am.AdaMerging(bank, toy, heads), Guard(3, 20, select, on_collapse="warn")
        trainer = train(module, images, 15, [Steer(values), guard])
        step = kept[select] = guard.record()["kept_step"]
        assert guard.record()["select"] == select
        wanted = values[max(place for place in values if place <= step)] if step else 0.3
        assert (module.coefficients.values == torch.tensor(wanted)).all()
    for step in tuple(looks):
        with torch.no_grad():
            module.coefficients.values.fill_(values[max(place for place in values if place <= step)] if step else 0.3)
        now, start = Watch(module, Ranks(), 20).compare(trainer, module)
        if any(alarm.stop for alarm in judge(now, start, None)):
            del looks[step]
        else:
            looks[step] = now
    for select, best in (("agreement", max), ("js", min), ("entropy", min)):
        means = {step: sum(getattr(one, select) for one in now.values()) for step, now in looks.items()}
        assert means[kept[select]] == pytest.approx(best(means.values()), abs=1e-6)
    assert kept["last"] == 15 and len(set(kept.values())) > 2


@pytest.mark.parametrize("select", ["agreement", "js", "entropy"])
def test_a_collapsed_state_is_never_the_one_to_keep(select, toy, bank, heads, images):
    """Entropy alone would choose it: large weights make sure predictions."""
    module, guard = am.AdaMerging(bank, toy, heads, bounds="free"), Guard(3, 20, select, on_collapse="warn")
    train(module, images, 12, [Steer({1: 0.2, 4: -9.0}), guard])
    assert guard.record()["kept_step"] in (0, 3) and guard.record()["warnings"]


def test_the_oracle_keeps_the_best_validation(toy, bank, heads, images):
    seen, guard = {}, Guard(every=50, select="oracle")

    class Note(pl.Callback):
        def on_validation_end(self, trainer, module):
            seen[trainer.global_step] = float(trainer.callback_metrics["adapted/accuracy"])

    module = am.AdaMerging(bank, toy, heads)
    steer = Steer({1: 0.1, 4: 0.6, 7: 0.25, 10: 0.0})
    settings = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}
    train(module, images, 12, [steer, guard, Note()], **settings)
    step = guard.record()["kept_step"]
    assert seen[step] == max(seen.values()) and len(set(seen.values())) > 1
    assert (module.coefficients.values == torch.tensor(steer.values[{3: 1, 6: 4, 9: 7, 12: 10}[step]])).all()


@pytest.mark.parametrize(
    ("settings", "protocol"),
    [(NO_SCORING, None), ({"limit_val_batches": 1.0, "val_check_interval": 30}, None), ({}, Online())],
)
def test_an_oracle_without_validation_is_an_error_before_the_first_step(settings, protocol, toy, bank, heads, images):
    module = am.AdaMerging(bank, toy, heads)
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None} | settings
    with pytest.raises(InputError, match="select='oracle'"):
        train(module, am.TaskStream(images, 8, protocol=protocol), 20, [Guard(select="oracle")], **settings)
    assert (module.coefficients.values == 0.3).all()


@pytest.mark.parametrize(("cut", "collapse"), [*((c, b) for c in (2, 6, 13, 17) for b in (False, True)), (24, False)])
def test_a_resumed_run_decides_as_the_uninterrupted_one(cut, collapse, toy, bank, heads, images, tmp_path):
    def make():
        return am.AdaMerging(bank, toy, heads, bounds="free", lr=1e-4)

    class Save(pl.Callback):
        """In the midst of a run, as the run's own checkpoints are."""

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == cut:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    guard, module = Guard(3, 20, "js"), make()
    steer = {4: 0.35, 7: 0.2} | ({10: -9.0} if collapse else {})
    # Saved before the guard looks; at the last step, after which there is no other look, after it, as in a run.
    callbacks = [Steer(steer), guard, Save()] if cut == 24 else [Steer(steer), Save(), guard]
    whole = train(module, images, 24, callbacks)
    other, resumed = Guard(3, 20, "js"), make()
    part = train(resumed, images, 24, [Steer(steer), other], tmp_path / "cut.ckpt")
    assert other.record() == guard.record() and guard.stopped is collapse
    assert part.global_step == whole.global_step
    assert all(torch.equal(*pair) for pair in zip(module.learned, resumed.learned))


def test_a_stopped_run_stays_stopped(toy, bank, heads, images, tmp_path):
    def run(source=None, **options):
        module, guard = am.AdaMerging(bank, toy, heads, bounds="free", lr=1e-4), Guard(3, 20, **options)
        trainer = train(module, images, 40, [Steer({1: -9.0}), guard], source)
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
        return guard.record(), trainer.global_step, module.coefficients.values.detach().clone()

    first, second = run(), run(tmp_path / "end.ckpt")
    assert first[0] == second[0] and first[1] == second[1] == 9
    assert torch.equal(first[2], second[2]) and (second[2] == 0.3).all()


def test_a_stopped_run_that_goes_on_all_the_same_is_not_called_stopped(toy, bank, heads, images, tmp_path):
    module, steer = am.AdaMerging(bank, toy, heads, bounds="free", lr=1e-4), Steer({1: -9.0})
    trainer = train(module, images, 40, [steer, Guard(3, 20)])
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    guard = Guard(3, 20, on_collapse="warn")
    trainer = train(module, images, 40, [steer, guard], tmp_path / "end.ckpt")
    assert trainer.global_step == 40 and not guard.stopped and guard.record()["kept_step"] == 40
    assert guard.record()["checks"] > 3


@pytest.mark.parametrize("select", ["agreement", "js", "entropy"])
def test_nothing_is_chosen_where_nothing_can_be_looked_at(select, toy, bank, heads, images):
    module, batches = am.AdaMerging(bank, toy, heads), am.TaskStream(images, 8).train_dataloader()
    trainer = pl.Trainer(max_steps=4, callbacks=[Guard(select=select)], **QUIET | NO_SCORING)
    with pytest.raises(InputError, match="this one has none"):
        trainer.fit(module, batches)
    stream = am.TaskStream(images, 8)
    stream.watched = lambda task, count, step: torch.arange(0)
    guard, module = Guard(every=2, select=select), am.AdaMerging(bank, toy, heads)
    train(module, stream, 4, [guard])
    assert guard.record()["kept_step"] == 4 and guard.record()["checks"] == 0
    assert not torch.equal(module.coefficients.values, module.views.start)


def test_one_pass_looks_only_at_what_was_predicted(toy, bank, heads, images):
    stream, asked = am.TaskStream(images, 2, protocol=Online()), []
    watched = stream.watched
    stream.watched = lambda task, count, step: asked.append((step, watched(task, count, step))) or asked[-1][1]
    guard = Guard(every=2, images=6, on_collapse="warn", select="agreement")
    trainer = train(am.AdaMerging(bank, toy, heads), stream, 100, [guard])
    assert trainer.global_step == 18 and guard.record()["checks"] == 9
    for step, index in asked:
        past = {int(i) for turn in range(step) for part in stream.draws[turn].values() for i in part}
        assert len(index) == min(6, 2 * step) and set(index.tolist()) <= past


def test_a_stream_without_watched_images(toy, bank, heads, images, caplog):
    class Own(pl.LightningDataModule):
        def train_dataloader(self):
            batches = [{task: {"image": source.take(torch.arange(4))} for task, source in images.items()}] * 12
            return DataLoader(batches, batch_size=None)

    module, guard = am.AdaMerging(bank, toy, heads, bounds="free"), Guard(every=3)
    with caplog.at_level(logging.WARNING, "adaptive_merge"):
        train(module, Own(), 12, [Steer({4: 7.0}), guard])
    assert sum("has no `watched`" in text for text in caplog.messages) == 1
    assert [warning["signal"] for warning in guard.record()["warnings"]] == ["coefficients"] * 3
    assert not guard.stopped and guard.record()["kept_step"] == 12


def test_signals_are_logged_at_looks_only(toy, bank, heads, images):
    log = Memory()
    train(am.AdaMerging(bank, toy, heads), images, 8, [Guard(every=3, images=8)], logger=log, log_every_n_steps=1)
    wanted = {"train/agreement", "train/red/agreement", "train/red/norm", "train/marginal", "train/blue/js"}
    with_signals = {step for step, row in log.rows.items() if wanted & row.keys()}
    assert with_signals == {2, 5, 7} and all(wanted <= log.rows[step].keys() for step in with_signals)


@pytest.mark.parametrize(
    ("stream", "make", "interval"),
    [
        ({"images_per_task": 16}, am.AdaMerging, 27),
        ({"images_per_task": 64}, am.AdaMerging, 25),
        ({"images_per_task": 16, "schedule": "shuffled"}, am.Tinting, 80),
        ({"images_per_task": 16, "protocol": Online()}, am.AdaMerging, 80),
    ],
)
def test_looking_costs_at_most_three_percent(stream, make, interval, toy, bank, heads, images):
    guard, module = Guard(), make(bank, toy, heads)
    train(module, am.TaskStream(images, **stream), 1, [guard])
    assert guard._interval == interval


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "at least 1 each"),
        ({"select": "accuracy"}, "unknown select 'accuracy'"),
        ({"on_collapse": "ignore"}, "unknown on_collapse 'ignore'"),
    ],
)
def test_impossible_guards(wrong, message):
    with pytest.raises(InputError, match=message):
        Guard(**wrong)


def test_a_run_may_be_resumed_with_another_choice(toy, bank, heads, images, tmp_path):
    for select, source, kept in (("agreement", None, {0, 3}), ("js", tmp_path / "6.ckpt", {6, 9, 12})):
        module, guard = am.AdaMerging(bank, toy, heads), Guard(3, 20, select)
        trainer = train(module, images, 12 if source else 6, [Steer({4: 0.9}), guard], source)
        trainer.save_checkpoint(tmp_path / "6.ckpt", weights_only=False)
        assert guard.record()["select"] == select and guard.record()["kept_step"] in kept
