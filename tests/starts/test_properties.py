"""What every closed form has to satisfy, whatever the method."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import bank_of, heads_of, images_of, small_vit

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.starts.choose import ChosenRegression
from adaptive_merge.starts.fisher import Fisher
from adaptive_merge.starts.mats import MaTS
from adaptive_merge.starts.regmean import LOT, RegMean, RegMeanPP
from adaptive_merge.starts.regression import CompensatedRegression, FeatCal
from adaptive_merge.starts.store import FileStore

ALL = [
    CompensatedRegression(0.1),
    CompensatedRegression(0.1, mixing=0.5, norms=True, stem=True),
    FeatCal(0.1),
    RegMean(0.9),
    RegMeanPP(0.9),
    LOT(1.2),
    MaTS("gram", 4),
    MaTS("block", 4),
    Fisher(samples=1),
]
EXACT = [
    CompensatedRegression(1e-5),
    CompensatedRegression(1e-5, norms=True, stem=True),
    RegMean(1.0),
    RegMeanPP(1.0),
    LOT(1.0),
    Fisher(samples=1),
]

# Where λ is small, the rounding of float32 activations over λ.
NEAR = 2e-3


def named(methods):
    return [pytest.param(method, id=repr(method)) for method in methods]


def distance(first, second):
    return float((first - second).norm() / second.norm())


def test_one_task_gives_features_of_its_expert(make_problem):
    bank = bank_of(small_vit(), ("red",))
    problem = make_problem(experts=bank)
    weights = bank.layout.unflatten(CompensatedRegression(1e-7, stem=True).solve(problem).weights)
    images = images_of(("red",))["red"]
    expected = torch.func.functional_call(problem.backbone, bank.expert("red"), (images,))
    merged = torch.func.functional_call(problem.backbone, weights, (images,))
    start = torch.func.functional_call(problem.backbone, bank.layout.unflatten(problem.anchor), (images,))
    assert (merged - expected).norm() < 0.1 * (start - expected).norm()


@pytest.mark.parametrize("method", named(EXACT + [FeatCal(1e-5), MaTS("gram", 300)]))
def test_one_task_on_its_own_weights_stays_there(make_problem, method):
    bank = bank_of(small_vit(), ("red",))
    own = bank.pretrained + bank.vectors[0]
    solved = method.solve(make_problem(experts=bank, anchor=own, images=images_of(("red",), 128))).weights
    assert distance(solved, own) < NEAR


@pytest.mark.parametrize("method", named(EXACT + [FeatCal(0.1), MaTS("gram", 300), MaTS("block", 300)]))
def test_identical_experts_give_that_expert(make_problem, method):
    bank = bank_of(small_vit())
    same = bank.with_vectors(bank.vectors[:1].expand(3, -1).clone())
    own = bank.pretrained + bank.vectors[0]
    solved = method.solve(make_problem(experts=same, anchor=own, images=images_of(count=64))).weights
    assert distance(solved, own) < NEAR


@pytest.mark.parametrize("method", named([CompensatedRegression(1e9, norms=True, stem=True), FeatCal(1e9)]))
def test_a_strong_anchor_is_the_solution(make_problem, method):
    problem = make_problem()
    assert distance(method.solve(problem).weights, problem.anchor) < 1e-6


@pytest.mark.parametrize("method", named(ALL[:-1]))
def test_order_of_tasks_and_images_does_not_matter(make_problem, method):
    bank, images = bank_of(small_vit()), images_of()
    turned = bank.select(("blue", "red", "green"))
    mixed = {task: pixels.flip(0) for task, pixels in images.items()}
    method = MaTS("block", 4, samples=None) if method == ALL[-2] else method
    first = method.solve(make_problem(experts=bank)).weights
    second = method.solve(make_problem(experts=turned, images=mixed, heads=heads_of())).weights
    assert distance(first, second) < 1e-5


@pytest.mark.parametrize("method", named([*ALL[:-2], MaTS("block", 4, samples=None), ALL[-1]]))
def test_streamed_in_batches_equals_at_once(make_problem, method):
    first, second = (method.solve(make_problem(batch=batch)).weights for batch in (7, 48))
    assert distance(first, second) < 1e-5


@pytest.mark.parametrize("method", named(ALL))
def test_a_task_without_images_is_an_error(make_problem, method):
    images = images_of() | {"green": torch.empty(0, 3, 8, 8)}
    with pytest.raises(InputError, match="no image of task 'green'"):
        method.solve(make_problem(images=images))


@pytest.mark.parametrize("method", named(ALL))
def test_killed_and_resumed_equals_uninterrupted(make_problem, method, tmp_path):
    whole = method.solve(make_problem()).weights
    stops = iter([False, True])

    def stop(done, total):
        if next(stops, False):
            raise KeyboardInterrupt

    store = FileStore(tmp_path / "start.safetensors")
    with pytest.raises(KeyboardInterrupt):
        method.solve(make_problem(store=store, progress=stop))
    calls = []
    resumed = method.solve(make_problem(store=store, progress=lambda done, total: calls.append(done))).weights
    assert torch.equal(resumed, whole)


def test_another_start_does_not_resume(make_problem, tmp_path):
    store = FileStore(tmp_path / "start.safetensors")
    CompensatedRegression(0.5).solve(make_problem(store=store))
    solved = CompensatedRegression(0.1).solve(make_problem(store=store)).weights
    assert torch.equal(solved, CompensatedRegression(0.1).solve(make_problem()).weights)


@pytest.mark.parametrize("method", named([*ALL[:-2], MaTS("block", 4, samples=None)]))
def test_two_processes_sum_to_one(make_problem, method):
    images = images_of()
    # The second process has nothing of one task.
    shares = [{task: pixels[:20] for task, pixels in images.items()}, {t: p[20:] for t, p in images.items()}]
    shares[0]["green"], shares[1]["green"] = images["green"], images["green"][:0]
    solved = in_two_processes(lambda number, add: method.solve(make_problem(images=shares[number], reduce=add)).weights)
    assert torch.equal(*solved)
    assert distance(solved[0], method.solve(make_problem()).weights) < 1e-5


@pytest.mark.parametrize("method", named([CompensatedRegression(0.1), MaTS("block", 4, samples=None), Fisher()]))
def test_a_process_may_have_no_image_at_all(make_problem, method):
    images = images_of()
    shares = [images, {task: pixels[:0] for task, pixels in images.items()}]
    solved = in_two_processes(lambda number, add: method.solve(make_problem(images=shares[number], reduce=add)).weights)
    assert torch.equal(*solved)
    assert distance(solved[0], method.solve(make_problem()).weights) < 1e-6


@pytest.mark.parametrize("cut", [5, 8])
def test_processes_choose_the_same(make_problem, cut):
    images = images_of(count=8)
    shares = [{t: p[:cut] for t, p in images.items()}, {t: p[cut:] for t, p in images.items()}]
    first, second = in_two_processes(
        lambda number, add: ChosenRegression().solve(make_problem(images=shares[number], reduce=add))
    )
    assert torch.equal(first.weights, second.weights)
    assert repr(first.choice) == repr(second.choice)
    if cut == 8:
        alone = ChosenRegression().solve(make_problem(images=images)).choice
        assert first.choice.start.settings == alone.start.settings


def test_the_images_are_part_of_what_a_store_keeps(make_problem):
    other = images_of() | {"green": images_of()["green"] + 0.1}
    more = images_of() | {"green": images_of()["green"][:47]}
    problems = [make_problem(), make_problem(images=other), make_problem(images=more)]
    first, second, third = (problem.identity(RegMean()) for problem in problems)
    assert first == make_problem().identity(RegMean())
    assert len({first, second, third}) == 3


def in_two_processes(work):
    """Runs `work(number, reduce)` twice side by side; `reduce` adds up what both give."""
    barrier, given, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def process(number):
        def add(tensor):
            given[number] = tensor
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        results[number] = work(number, add)

    threads = [threading.Thread(target=process, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_equal_grams_give_the_mean(make_problem):
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6))
    bank, pixels = bank_of(backbone), images_of(("red",), 300)["red"]
    problem = make_problem(experts=bank, backbone=backbone, images=dict.fromkeys(bank.tasks, pixels))
    assert distance(RegMean(1.0).solve(problem).weights, bank.pretrained + bank.vectors.mean(0)) < 1e-5


def test_each_expert_is_made_once_a_block(make_problem, monkeypatch):
    from adaptive_merge.starts.base import Problem

    made, original = [], Problem.expert

    def counted(self, task, names=None):
        made.extend((task, name) for name in (self.experts.names if names is None else names))
        return original(self, task, names)

    monkeypatch.setattr(Problem, "expert", counted)
    CompensatedRegression(0.1).solve(make_problem())
    assert len(made) == len(set(made))


def test_a_bfloat16_bank_is_enough(make_problem):
    bank = bank_of(small_vit())
    half = TaskVectors(bank.tasks, bank.layout, bank.pretrained, bank.vectors.bfloat16(), {})
    first, second = (CompensatedRegression(0.1).solve(make_problem(experts=b)).weights for b in (bank, half))
    assert distance(second, first) < 1e-2


def test_images_are_normalised_floats(make_problem):
    images = {task: torch.zeros(4, 3, 8, 8, dtype=torch.uint8) for task in ("red", "green", "blue")}
    with pytest.raises(InputError, match="normalised images"):
        RegMean().solve(make_problem(images=images))
