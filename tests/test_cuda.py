"""What only a CUDA device can show; `bash scripts/gpu_check.sh` runs these tests, and the benchmark after them."""

import pytest
import torch
import torch.distributed as dist
from fitting import fit
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy

import adaptive_merge as am
from adaptive_merge.merge import placement
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.parts import BankPart

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
GPU = {"accelerator": "gpu", "devices": 1}
KINDS = ("resident", "streamed", "sharded")


@pytest.fixture
def learned(bank, toy, heads, images, monkeypatch):
    """Λ after each of some steps of AdaMerging, with settings of the module and of the trainer."""
    monkeypatch.setattr(placement, "PIECE", 50)  # the toy has 616 entries

    def run(trainer=GPU, compiled=False, **settings):
        module = am.AdaMerging(bank, toy, heads, **settings)
        return fit(torch.compile(module) if compiled else module, images, 6, **trainer).cpu()

    return run


@pytest.fixture
def expected(learned):
    return learned({"accelerator": "cpu"})


@pytest.fixture
def host_bank():
    """Eight tasks of four million entries, 0.15 GB in all, in host memory."""
    layout = Layout(("weight", "bias"), ((1000, 4096), (1 << 17,)))
    tasks = [f"task{number}" for number in range(8)]
    return am.TaskVectors(tasks, layout, torch.randn(layout.numel), torch.randn(8, layout.numel), {})


@pytest.mark.parametrize("accumulate", ["joint", "per_task"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_a_processor(learned, expected, kind, accumulate):
    torch.testing.assert_close(learned(bank=kind, accumulate=accumulate), expected, atol=1e-5, rtol=1e-5)
    assert (expected[-1] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_arrive_whole_through_pinned_memory(host_bank, dtype):
    bank = host_bank.with_vectors(host_bank.vectors.to(dtype))
    starts = range(0, bank.layout.numel, 1 << 17)
    parts = [BankPart.between(bank, start, min(start + (1 << 17), bank.layout.numel)) for start in starts]
    arrived = [part.on(torch.device(DEVICE)) for part in parts]  # none is waited for
    vectors = torch.cat([part.bank.vectors.cpu() for part in arrived], dim=1)
    pretrained = torch.cat([part.bank.pretrained.cpu() for part in arrived])
    assert torch.equal(vectors, bank.vectors) and torch.equal(pretrained, bank.pretrained)
    assert all(part.bank.vectors.device.type == DEVICE for part in arrived)


def test_a_streamed_bank_takes_a_piece_of_the_device(host_bank, monkeypatch):
    monkeypatch.setattr(placement, "PIECE", 1 << 18)
    rule, merged, peaks = am.LayerWise(0.3).bind(host_bank), {}, {}
    for kind in ("resident", "streamed"):
        home = placement.place(host_bank, kind)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        home.to(torch.device(DEVICE))
        merged[kind] = home.combine(rule, rule.settled()).cpu()
        peaks[kind] = torch.cuda.max_memory_allocated() - before
        del home
    torch.testing.assert_close(merged["streamed"], merged["resident"])
    size = 4 * host_bank.layout.numel
    assert peaks["resident"] >= 10 * size, "bank and θ"
    assert peaks["streamed"] < 4 * size, "θ, a piece or two, and what the allocator rounds up"


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_over_nccl(learned, expected, kind, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what Lightning puts there goes again
        monkeypatch.delenv(name)
    try:
        ours = learned(GPU | {"strategy": DDPStrategy(process_group_backend="nccl")}, bank=kind)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_stays_close(learned, expected, precision):
    # Torch's first scale is so high that the first steps are left out.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64) if precision == "16-mixed" else None
    ours = learned(GPU | {"plugins": [MixedPrecision(precision, DEVICE, scaler)]})
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    assert (ours - expected).abs().max() < 0.01
    assert (ours[-1] - ours[0]).abs().max() > 1e-3


def test_a_compiled_step_is_the_same(learned, expected):
    torch.testing.assert_close(learned(compiled=True), expected, atol=1e-5, rtol=1e-5)
