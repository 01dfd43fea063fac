"""Lightning's distributed sampler, which plain Python has switched on, does not deal the images out a second time."""

import torch
from processes import guarded, launch, parts

import adaptive_merge as am


def _fit(rank, sampler, folder):
    bank, toy, heads, images = parts()
    module = am.AdaMerging(bank, toy, heads)
    trainer = guarded(folder, 2, use_distributed_sampler=sampler, max_steps=3)
    stream = am.TaskStream(images, 8)
    trainer.fit(module, datamodule=stream)
    trainer.validate(module, datamodule=stream, verbose=False)
    if rank == 0:
        torch.save([dict(trainer.callback_metrics), [value.detach() for value in module.learned]], folder / "end.pt")


def test_the_sampler_makes_no_difference(tmp_path):
    ends = []
    for sampler in (False, True):
        folder = tmp_path / str(sampler)
        assert launch(2, _fit, sampler, folder, folder=folder) == [0, 0]
        ends.append(torch.load(folder / "end.pt", weights_only=True))
    assert ends[0][0] == ends[1][0] and all(torch.equal(*pair) for pair in zip(ends[0][1], ends[1][1]))
