"""What is touched behind other libraries' public names is still there and still does what it did."""

from __future__ import annotations

import importlib
import inspect
from datetime import timedelta

import pytest
import torch
from data.data_sets import NEEDS, WRITERS
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.constants import default_pg_timeout
from torchvision import datasets

from adaptive_merge import upstream

MINUTE = timedelta(minutes=1)
OPEN = {
    "Cars": lambda root: datasets.StanfordCars(root, split="test"),
    "DTD": lambda root: datasets.DTD(root, split="test"),
    "GTSRB": lambda root: datasets.GTSRB(root, split="test"),
    "OxfordIIITPet": lambda root: datasets.OxfordIIITPet(root, split="test"),
    "Flowers102": lambda root: datasets.Flowers102(root, split="test"),
    "Food101": lambda root: datasets.Food101(root, split="test"),
    "RenderedSST2": lambda root: datasets.RenderedSST2(root, split="test"),
}


@pytest.mark.parametrize("path", upstream.OVERRIDDEN)
def test_overridden_hooks_are_there_and_called_by_their_class(path):
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    source = inspect.getsource(kind)
    for hook in upstream.OVERRIDDEN[path]:
        assert callable(getattr(kind, hook)), f"{path}.{hook} is gone"
        assert f".{hook}(" in source, f"{path} no longer calls {hook}"


def test_changes_in_place_are_counted():
    tensor = torch.zeros(2)
    before = upstream.version_of(tensor)
    tensor.add_(1)
    assert upstream.version_of(tensor) > before


def test_only_the_default_timeout_is_replaced_and_it_reaches_the_group(monkeypatch):
    strategy, chosen = DDPStrategy(), DDPStrategy(timeout=timedelta(seconds=default_pg_timeout.total_seconds()))
    for one in (strategy, chosen):
        upstream.bound_timeout(one, MINUTE)
    assert (upstream.timeout_of(strategy), upstream.timeout_of(chosen)) == (MINUTE, default_pg_timeout)
    assert upstream.timeout_of(object()) is None
    assert "self._timeout" in inspect.getsource(DDPStrategy.setup_distributed)


def test_ddp_options_reach_torch_under_those_of_the_user(monkeypatch):
    passed = {}
    module = "pytorch_lightning.strategies.ddp.DistributedDataParallel"
    monkeypatch.setattr(module, lambda **options: passed.update(options))
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")], bucket_cap_mb=7)
    upstream.add_ddp_options(strategy, {"bucket_cap_mb": 1, "find_unused_parameters": True})
    strategy._setup_model(torch.nn.Linear(1, 1))
    assert (passed["bucket_cap_mb"], passed["find_unused_parameters"]) == (7, True)


def test_options_reach_wandb_and_the_logger_follows_them(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    passed = {}
    monkeypatch.setattr(wandb, "init", lambda **options: passed.update(options))
    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setenv("WANDB_MODE", "unset")
    logger = WandbLogger(offline=True)
    assert upstream.is_offline(logger) and not upstream.is_offline(WandbLogger())
    upstream.wandb_options(logger).update(id="abc", name="first", dir=str(tmp_path), mode="offline")
    upstream.redirect(logger)
    assert (logger.version, logger.name, logger.save_dir) == ("abc", "lightning_logs", str(tmp_path))
    _ = logger.experiment
    assert passed["id"] == "abc" and passed["mode"] == "offline"


@pytest.mark.parametrize("name", OPEN)
def test_data_sets_of_files_list_them_as_they_are_indexed(tmp_path, name, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is stored in a format that needs it")
    # It knows its files by their md5; ours are of the same format but smaller.
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: True)
    WRITERS[name](tmp_path)
    dataset = OPEN[name](str(tmp_path))
    pairs = upstream.labelled_files(dataset)
    assert [label for _, label in pairs] == [label for _, label in dataset]
    assert len(pairs) == len(dataset) and all(path.is_file() for path, _ in pairs)


def test_tensors_without_numbers_have_shapes_and_refuse_to_say_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    with upstream.shapes_alone():
        value = torch.empty(3, 4)
        product = value @ torch.ones(4, 2)
        assert upstream.is_hollow(product) and product.shape == (3, 2) and product.device.type == "cpu"
        with pytest.raises(RuntimeError):
            bool(product.sum() > 0)
    assert not upstream.is_hollow(torch.empty(1))
