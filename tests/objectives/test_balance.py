"""The smooth maximum over tasks: the formula, the same in one graph, task by task and over two processes."""

import pytest
import torch
from fitting import fit
from processes import guarded, launch, parts, texts

import adaptive_merge as am
from adaptive_merge.objectives.base import Prediction

KINDS = {
    "entropy": lambda alpha: am.Balance(alpha=alpha),
    "diverse and reliable entropy": lambda alpha: am.Balance(am.Entropy(diversity=0.3, reliable=0.95), alpha),
    "soft labels": lambda alpha: am.Balance(am.PseudoLabel(soft=True, confident=True), alpha),
    "divergence": lambda alpha: am.Balance(am.ExpertKL(2.0), alpha),
}


def module_of(objective, accumulate, adapters=False):
    bank, toy, heads, images = parts()
    extra = [am.Tint("head"), am.FeatureSurgery(2)] if adapters else []
    settings = {"coefficients": am.LayerWise(0.3, "free"), "adapters": extra, "objective": objective}
    return am.AdaptiveMerge(bank, toy, heads, accumulate=accumulate, lr=0.02, **settings), images


def written_down(module, images, draws, alpha):
    """α log Σ exp((H − H*) / (T α)) of a step, from models merged and run one by one."""
    excess = []
    merged = module.model.backbone.merge()
    for task, index in draws.items():
        pixels = images[task].take(index)
        ours = torch.distributions.Categorical(logits=module.model(task, pixels, merged).logits)
        weights = {name: value.float() for name, value in module.experts.expert(task).items()}
        own = torch.distributions.Categorical(logits=module.model(task, pixels, weights).logits)
        excess.append(ours.entropy().mean() - own.entropy().mean().detach())
    return alpha * (torch.stack(excess) / (len(excess) * alpha)).exp().sum().log()


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
@pytest.mark.parametrize("alpha", [1.0, 0.02])
def test_a_step_is_the_formula(accumulate, alpha):
    module, images = module_of(am.Balance(alpha=alpha), accumulate)
    stream = am.TaskStream(images, 8)
    expected = written_down(module, images, stream.draws[0], alpha)
    (gradient,) = torch.autograd.grad(expected, module.coefficients.values)
    seen = {}

    class Spy(am.Ledger):
        def on_before_optimizer_step(self, trainer, learner, optimizer):
            seen.update(gradient=learner.coefficients.values.grad.clone())

        def on_train_batch_end(self, trainer, learner, outputs, *_):
            seen.update(loss=outputs["loss"])

    trainer = guarded("unused", callbacks=[Spy("unused")], max_steps=1)
    trainer.fit(module, datamodule=stream)
    torch.testing.assert_close(seen["loss"], expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen["gradient"], gradient, atol=1e-6, rtol=1e-4)


def test_a_small_alpha_follows_the_worst_task_alone():
    module, images = module_of(am.Balance(am.ExpertKL(), alpha=1e-4), "per_task", adapters=True)
    before = {name: value.clone() for name, value in module.model.adapters[0].state_dict().items()}
    fit(module, images, steps=1)
    after = module.model.adapters[0].state_dict()
    moved = {name.rpartition(".")[2] for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(moved) == 1  # the others' gradients are 0, not merely small


@pytest.mark.parametrize("kind", KINDS)
def test_joint_and_per_task_learn_the_same(kind):
    learned = []
    for accumulate in ("joint", "per_task"):
        module, images = module_of(KINDS[kind](0.05), accumulate, adapters=True)
        fit(module, images, stream={"images_per_task": 5})
        learned.append(module.state_dict())
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, atol=1e-5, rtol=1e-5, msg=name)


def learn(rank, world, folder):
    for share in ("samples", "tasks"):
        for accumulate in ("joint", "per_task"):
            for kind, make in list(KINDS.items())[: 1 if world == 4 else None]:
                module, images = module_of(make(0.05), accumulate, adapters=True)
                data = am.TaskStream(images, 6, share=share)
                trainer = guarded(folder, world, max_steps=10)
                trainer.fit(module, datamodule=data)
                state = {key: value.clone() for key, value in module.state_dict().items()}
                torch.save(
                    (state, float(trainer.callback_metrics["train/loss"])),
                    folder / f"{share}-{accumulate}-{kind}-{rank}.pt",
                )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    learn(0, 1, folder)
    return folder


@pytest.mark.parametrize("world", [2, 4])  # of four processes one has no task
def test_processes_learn_the_same(alone, tmp_path, world):
    assert launch(world, learn, world, tmp_path, folder=tmp_path) == [0] * world, texts(tmp_path)
    for path in tmp_path.glob("*-0.pt"):
        state, loss = torch.load(alone / path.name, weights_only=True)
        for rank in range(world):
            file = tmp_path / path.name.replace("-0.pt", f"-{rank}.pt")
            other, other_loss = torch.load(file, weights_only=True)
            assert other_loss == pytest.approx(loss, abs=1e-5), path.name
            for name, value in state.items():
                torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5, msg=f"{path.name} {name}")


def test_a_balance_of_a_balance_and_one_task_a_step_are_refused():
    with pytest.raises(am.InputError, match="give it one that is not balanced"):
        am.Balance(am.Balance())
    module, images = module_of(am.Balance(), "auto")
    with pytest.raises(am.InputError, match="one task a"):
        fit(module, images, stream={"schedule": "shuffled"})


def test_own_losses_are_the_experts():
    expert = Prediction(torch.ones(4, 3), 3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    for make in KINDS.values():
        objective = make(1.0)
        statistics = objective.statistics(expert, expert)
        given = expert if statistics is None else Prediction(expert.features, expert.logits, (), statistics.mean(0))
        torch.testing.assert_close(objective.losses(given, expert), torch.zeros(4), atol=1e-6, rtol=0)
