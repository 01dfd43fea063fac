"""A checkpoint is gone on from by the run that wrote it: another method or other data are refused by name."""

import hashlib
import shutil
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from processes import guarded, launch, parts, texts

import adaptive_merge as am
from adaptive_merge.__main__ import main
from adaptive_merge.coefficients.files import save_coefficients
from adaptive_merge.engine import identity
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.schedule import Stage

SECRET = "planted0objective0key"


class Mine(am.PseudoLabel):
    """A user's own objective, with every kind of attribute."""

    def __init__(self, temperature=2.0, table=(1, 2), shape=torch.relu, prior=None, inner=None, api_key=SECRET):
        super().__init__(confident=True)
        self.temperature, self.table, self.shape, self.inner = temperature, table, shape, inner
        self.prior = torch.zeros(3) if prior is None else prior
        self.api_key, self.handle, self._seen = api_key, object(), 0
        self.count = 0

    def losses(self, prediction, expert):
        self.count += 1
        return super().losses(prediction, expert)


class Inner:
    def __init__(self, strength):
        self.strength, self.back = strength, self


def module(**changes):
    bank, toy, heads, _ = parts()
    settings = {
        "recipe": "mine",
        "transforms": [am.Ties(0.5)],
        "coefficients": am.LayerWise(0.3),
        "adapters": [am.Tint("head"), am.FeatureSurgery(2)],
        "objective": Mine(inner=Inner(1)),
        "lr": 0.01,
    }
    given = {"task_vectors": bank, "backbone": toy, "heads": heads, **settings, **changes}
    return am.AdaptiveMerge(**given)


def stream(images=None, **changes):
    return am.TaskStream(images or parts()[3], **{"images_per_task": 8} | changes)


def fit(folder, learner=None, data=None, source=None, steps=2, **settings):
    trainer = guarded(folder, max_steps=steps, **settings)
    trainer.fit(learner or module(), datamodule=data or stream(), ckpt_path=source, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "last.ckpt"
    fit(path.parent).save_checkpoint(path, weights_only=False)
    return path


def other_bank():
    bank = parts()[0]
    return bank.with_vectors(bank.vectors * 1.5)


def other_heads():
    heads = parts()[2]
    return heads | {"red": heads["red"] * 1.01}


METHODS = {
    "transform 1": lambda: {"transforms": []},
    "transform 1: density": lambda: {"transforms": [am.Ties(0.4)]},
    "transform 1: reduce": lambda: {"transforms": [am.Ties(0.5, reduce="mean")]},
    "transform 2": lambda: {"transforms": [am.Ties(0.5), am.Ties(0.5)]},
    "coefficients": lambda: {"coefficients": am.BlockWise(0.3)},
    "coefficients: init": lambda: {"coefficients": am.LayerWise(0.4)},
    "coefficients: bounds": lambda: {"coefficients": am.LayerWise(0.3, bounds="free")},
    "coefficients: trainable": lambda: {"coefficients": am.LayerWise(0.3, trainable=False)},
    "adapter 1": lambda: {"adapters": []},
    "adapter 1: layer": lambda: {"adapters": [am.Tint("proj"), am.FeatureSurgery(2)]},
    "adapter 2": lambda: {"adapters": [am.Tint("head")]},
    "adapter 2: rank": lambda: {"adapters": [am.Tint("head"), am.FeatureSurgery(3)]},
    "objective": lambda: {"objective": am.PseudoLabel(confident=True)},
    "objective: temperature": lambda: {"objective": Mine(temperature=3.0, inner=Inner(1))},
    "objective: table": lambda: {"objective": Mine(table=(1, 3), inner=Inner(1))},
    "objective: shape": lambda: {"objective": Mine(shape=torch.tanh, inner=Inner(1))},
    "objective: prior": lambda: {"objective": Mine(prior=torch.ones(3), inner=Inner(1))},
    "objective: inner: strength": lambda: {"objective": Mine(inner=Inner(2))},
    "stages": lambda: {"objective": None, "stages": [Stage(1, "all", am.Entropy()), Stage(1, "all", am.Entropy())]},
    "learning rate": lambda: {"lr": 0.02},
    "learning rate of the adapters": lambda: {"adapter_lr": 0.02},
    "betas": lambda: {"betas": (0.9, 0.99)},
    "weight decay": lambda: {"weight_decay": 0.1},
    "head of task 'red'": lambda: {"heads": other_heads()},
    "experts": lambda: {"task_vectors": other_bank()},
}


@pytest.mark.parametrize("name", METHODS)
def test_another_method_is_refused_by_name(written, tmp_path, name):
    learner = module(**METHODS[name]())
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    with pytest.raises(am.InputError, match=f"another {name}: .*this run has .*config.yaml"):
        fit(tmp_path, learner, source=written)
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())


def one_pixel():
    images = parts()[3]
    images["green"].pixels[3, 1, 2, 0] ^= 1
    return images


DATA = {
    "images per task": lambda: {"images_per_task": 4},
    "sampling": lambda: {"sampling": "epoch"},
    "schedule": lambda: {"schedule": "shuffled"},
    "seed of the stream": lambda: {"seed": 1},
    "protocol": lambda: {"protocol": am.Holdout(0.5)},
    "images of task 'green'": lambda: {"images": one_pixel()},
    "corruption": lambda: {"corruption": am.Corruption("contrast")},
    "tasks of the stream": lambda: {"images": dict(reversed(parts()[3].items()))},
}


@pytest.mark.parametrize("name", DATA)
def test_other_data_is_refused_by_name(written, tmp_path, name):
    with pytest.raises(am.InputError, match=f"another {name}: .*this run has"):
        fit(tmp_path, data=stream(**DATA[name]()), source=written)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (lambda share: {"protocol": am.Holdout(share / 10)}, "protocol: share: 0.4, this run has 0.5"),
        (
            lambda severity: {"corruption": am.Corruption("contrast", severity)},
            "corruption: severity: 4, this run has 5",
        ),
    ],
)
def test_the_settings_of_protocol_and_corruption_count(tmp_path, kind, told):
    path = tmp_path / "last.ckpt"
    fit(tmp_path, data=stream(**kind(4))).save_checkpoint(path, weights_only=False)
    fit(tmp_path, data=stream(**kind(4)), source=path, steps=3)
    with pytest.raises(am.InputError, match=f"another {told}"):
        fit(tmp_path, data=stream(**kind(5)), source=path)


def test_stages_count_one_by_one(tmp_path):
    path = tmp_path / "last.ckpt"

    def staged(steps=1, learn="adapters", kind="l1"):
        stages = [Stage(steps, learn, am.FeatureDistance(kind)), Stage(1, "all", am.Entropy())]
        return module(objective=None, stages=stages)

    fit(tmp_path, staged()).save_checkpoint(path, weights_only=False)
    for name, changed in (("steps", {"steps": 2}), ("learns", {"learn": "all"}), ("objective: kind", {"kind": "l2"})):
        with pytest.raises(am.InputError, match=f"another stage 1: {name}"):
            fit(tmp_path, staged(**changed), source=path)


def test_loaders_without_a_data_module_are_other_data(written, tmp_path):
    trainer, loader = guarded(tmp_path, max_steps=3), stream().train_dataloader()
    with pytest.raises(am.InputError, match="another data: .*TaskStream', this run has 'loaders without"):
        trainer.fit(module(), loader, ckpt_path=written, weights_only=True)


def relabelled():
    images = parts()[3]
    return {task: am.Images(part.pixels, part.labels.flip(0), part.classes) for task, part in images.items()}


def test_what_does_not_change_what_is_learned_may_differ(written, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    learner = module(accumulate="joint", cache=str(tmp_path / "elsewhere"), bank="streamed")
    data = stream(relabelled(), num_workers=1, eval_batch_size=3, share="tasks")
    assert fit(tmp_path, learner, data, written, steps=4, gradient_clip_val=100.0).global_step == 4
    assert fit(tmp_path, module(lr=0.01, betas=[0.9, 0.999]), source=written, steps=3).global_step == 3
    assert fit(tmp_path, module(recipe="another label"), source=written, steps=3).global_step == 3


def test_validation_looks_at_the_method_only(written, tmp_path):
    trainer = guarded(tmp_path)
    trainer.validate(module(), datamodule=stream(one_pixel(), seed=5), ckpt_path=written, weights_only=True)
    with pytest.raises(am.InputError, match="another learning rate"):
        trainer.validate(module(lr=1.0), datamodule=stream(), ckpt_path=written, weights_only=True)


def test_coefficients_of_a_file_count_by_their_values(tmp_path):
    def start(folder, value):
        folder.mkdir()
        save_coefficients(folder / "coefficients.json", module(coefficients=am.LayerWise(value)).coefficients.table())
        return module(coefficients=am.LayerWise(str(folder)))

    path = tmp_path / "last.ckpt"
    fit(tmp_path, start(tmp_path / "a", 0.2)).save_checkpoint(path, weights_only=False)
    fit(tmp_path, start(tmp_path / "moved", 0.2), source=path, steps=3)
    with pytest.raises(am.InputError, match="another coefficients: init: 'values of sha256"):
        fit(tmp_path, start(tmp_path / "b", 0.25), source=path)


def test_it_is_plain_small_and_without_secrets_and_addresses(written):
    told = read_checkpoint(written)["adaptive_merge"]
    assert set(told) == {"recipe", "method", "data"}
    assert not {"objective: count", "objective: handle", "objective: filters"} & set(told["method"]), "no state"
    assert told["method"]["objective: api_key"] == "(hidden)"
    assert "0x" not in str({key: value for key, value in told["method"].items() if "sha256" not in str(value)})
    content = written.read_bytes()
    assert SECRET.encode() not in content and len(str(told)) < 6000


class Payload:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("forged", "told"),
    [
        ("text", "does not say which method"),
        ({}, "does not say which method"),
        ({"method": {}, "data": {}}, "another tasks: nothing,"),
        ({"method": {"recipe": "mine"}, "data": {}}, "another tasks: nothing,"),
        ({"method": {"tasks": torch.zeros(2)}, "data": {}}, "another tasks: nothing readable"),
        ({"method": {"tasks": "\x1b[2J" + "x" * 10_000}, "data": {}}, r"another tasks: '\\x1b\[2Jx+…"),
    ],
)
def test_forged_and_missing_content_is_refused(written, tmp_path, forged, told):
    path = tmp_path / "forged.ckpt"
    torch.save(torch.load(written, weights_only=True) | {"adaptive_merge": forged}, path)
    with pytest.raises(am.InputError, match=told) as refused:
        fit(tmp_path, source=path)
    assert len(str(refused.value)) < 1000


def test_content_with_code_is_not_run(written, tmp_path, capsys):
    path = tmp_path / "forged.ckpt"
    torch.save(torch.load(written, weights_only=True) | {"adaptive_merge": {"method": Payload(), "data": {}}}, path)
    with pytest.raises(am.InputError, match="not a readable checkpoint"):
        fit(tmp_path, source=path)
    nested = "a"
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(am.InputError, match="another tasks"):
        identity.check({"adaptive_merge": {"method": {"tasks": nested}, "data": {}}}, {"tasks": ["mine"]})
    assert capsys.readouterr().out == ""


def refused_member(rank, folder, source):
    data = stream(images_per_task=4)
    try:
        guarded(folder, 2, max_steps=4).fit(module(), datamodule=data, ckpt_path=source, weights_only=True)
    except am.InputError as error:
        return 7 if "another images per task" in str(error) else 8


def test_every_process_refuses(written, tmp_path):
    assert launch(2, refused_member, tmp_path, written, folder=tmp_path / "log") == [7, 7], texts(tmp_path / "log")


CONFIG = """
model:
  recipe: quick
  coefficients: {class_path: LayerWise, init_args: {init: 0.3}}
  objective: {class_path: PseudoLabel}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false}
data: {images_per_task: 4}
"""


@pytest.fixture
def work(tmp_path, monkeypatch, suite_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(f"suite: {{name: {suite_folder}}}" + CONFIG)
    assert main(["fit", "--config", "quick.yaml"]) == 0
    return tmp_path / "runs" / "quick"


def digests(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_command_line_refuses_and_leaves_the_run_as_it_was(work, capsys):
    before = digests(work)
    for name, change in {
        "learning rate": "--model.lr=0.5",
        "objective: confident": "--model.objective.confident=true",
        "coefficients: init": "--model.coefficients.init=0.1",
        "images per task": "--data.images_per_task=8",
        "seed of the stream": "--seed_everything=3",
    }.items():
        arguments = ["fit", "--config", "quick.yaml", change, "--trainer.max_steps=4", "--run.if_exists=resume"]
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert f"another {name}: " in told and "Traceback" not in told
        assert digests(work) == before
    arguments = [
        "--trainer.max_steps=4",
        "--data.eval_batch_size=5",
        "--data.num_workers=1",
        "--model.accumulate=joint",
    ]
    assert main(["fit", "--config", "quick.yaml", "--run.if_exists=resume", *arguments]) == 0
    assert read_checkpoint(work / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_a_run_folder_with_another_method_is_not_read(work, capsys):
    shutil.copytree(work, work.with_name("changed"))
    config = work.with_name("changed") / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["model"]["coefficients"]["init_args"]["init"] = 0.1
    config.write_text(yaml.safe_dump(content))
    assert main(["merge", "runs/changed", "--output", "merged.safetensors"]) == 2
    assert "another coefficients: init: 0.3, this run has 0.1" in capsys.readouterr().err
    content["model"]["coefficients"]["init_args"]["init"], content["data"]["seed"] = 0.3, 9
    config.write_text(yaml.safe_dump(content))
    assert main(["merge", "runs/changed", "--output", "merged.safetensors"]) == 0


def halve(bank):
    return bank.with_vectors(bank.vectors / 2)


class Renamed(am.PseudoLabel):
    """Keeps its argument elsewhere, and says so."""

    def __init__(self, temperature=2.0):
        super().__init__()
        self._inverse, self.count = 1 / temperature, 0

    @property
    def settings(self):
        return {"temperature": 1 / self._inverse}


class HandedOn(am.Entropy):
    """Hands all but one of its arguments on."""

    def __init__(self, *args, extra=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra, self.count = extra, 0


class Silent(am.PseudoLabel):
    """Keeps its argument nowhere: what is public counts instead."""

    def __init__(self, temperature=2.0):
        super().__init__()
        self.inverse, self._sharp = 1 / temperature, temperature > 1


class Learned(am.Adapter):
    """Has a learned parameter, and a method, of an argument's name."""

    def __init__(self, shift=1.0, row=2):
        super().__init__()
        self.start, self.place = shift, row

    def create(self, backbone, heads):
        self.shift = torch.nn.Parameter(torch.rand(3))


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (am.Entropy(), {"diversity": 0.0, "reliable": None}),
        (am.FeatureDistance("l2", blocks=True), {"kind": "l2", "blocks": True}),
        (am.PseudoLabel(confident=True), {"soft": False, "confident": True}),
        (am.ExpertDivergence(), {}),
        (am.Tint("proj"), {"layer": "proj"}),
        (am.BlockSurgery(3), {"rank": 3}),
        (am.Ties(0.5), {"density": 0.5, "counted_over": None, "reduce": "sum"}),
        (am.Unseen(["red", "red"]), {"tasks": ("red",)}),
        (am.Online(), {}),
        (am.Corruption("contrast"), {"kind": "contrast", "severity": 3, "seed": 0}),
        (Renamed(4.0), {"temperature": 4.0}),
        (HandedOn(0.5, extra=2), {"extra": 2, "diversity": 0.5, "reliable": None}),
        (Silent(4.0), {"soft": False, "confident": False, "filters": False, "inverse": 0.25}),
        (halve, {}),
    ],
    ids=lambda value: identity.kind(value) if not isinstance(value, dict) else "",
)
def test_settings_are_the_arguments_of_the_constructor(part, settings):
    assert identity.settings(part) == settings


def test_what_learns_and_what_a_class_has_are_no_arguments():
    settings = identity.settings(module(adapters=[Learned(0.5)]).model.adapters[0])
    assert settings == {"start": 0.5, "place": 2}


class Mode(Enum):
    HARD = 1
    SOFT = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Mode.HARD, Mode.SOFT),
        (Path("a"), Path("b")),
        ({"x", "y"}, {"x", "z"}),
        (torch.float32, torch.bfloat16),
        (np.zeros(2000), np.eye(1, 2000, 999)[0]),
        ({"a": [Inner(1)]}, {"a": [Inner(2)]}),
        (torch.relu, torch.tanh),
    ],
)
def test_a_setting_of_any_kind_tells_parts_apart(one, other):
    first, second = (identity.of_part("objective", Mine(prior=value)) for value in (one, other))
    assert first != second
    assert first == identity.of_part("objective", Mine(prior=one))


def test_an_object_that_only_has_an_address_is_no_setting():
    assert "objective: prior" not in identity.of_part("objective", Mine(prior=object()))


def test_settings_that_are_no_mapping_are_a_named_mistake():
    class Wrong(am.Entropy):
        settings = property(lambda self: 3)

    with pytest.raises(am.InputError, match="`settings` of .*Wrong has to give a mapping"):
        identity.settings(Wrong())


def test_a_kind_is_a_public_name_or_a_user_s_with_its_module():
    parts = module(transforms=[am.Ties(0.5), halve]).method
    assert (parts["transform 1"], parts["adapter 1"], parts["coefficients"]) == ("Ties", "Tint", "LayerWise")
    assert (parts["transform 2"], parts["objective"]) == (f"{__name__}.halve", f"{__name__}.Mine")
    assert identity.kind(am.objectives.functional.entropy) == "entropy"


def test_every_argument_of_every_part_that_ships_is_a_setting():
    """A part that keeps an argument under another name has to say so."""
    given = {"tasks": ["red"], "kind": "contrast"}
    for name in am.__all__:
        part = getattr(am, name)
        base = isinstance(part, type) and issubclass(part, (am.Adapter, am.Objective, am.Protocol, am.Transform))
        if not base or part.__abstractmethods__:
            continue
        arguments = identity._arguments(part)
        made = part(**{key: value for key, value in given.items() if key in arguments and name == "Unseen"})
        assert list(identity.settings(made)) == arguments, name
    for kind in (am.Fixed, am.TaskWise, am.LayerWise, am.BlockWise):
        bound = module(coefficients=kind(0.3)).coefficients
        assert list(identity.settings(bound)) == [*identity._arguments(kind), "groups"]
