"""A file of ours with a changed byte is refused: never read as something else, and never the end of the program."""

import random
import time

import pytest
import torch
from processes import guarded, parts

import adaptive_merge as am
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.runs.checkpoint_io import AtomicCheckpointIO

TIMES = [100, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
SECONDS = 60  # for one file of kilobytes: it ends, however busy the machine is


def flip(content, draw):
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)


def cut(content, draw):
    del content[draw.randrange(len(content)) :]


def swap(content, draw):
    """Two pieces of up to 64 bytes change places."""
    size = draw.randint(1, 64)
    first, second = sorted(draw.randrange(len(content) - size) for _ in range(2))
    first = min(first, max(second - size, 0))
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )


def edit_header(content, draw):
    """A run of other bytes where the header, or the first record, of a file lies."""
    place = draw.randrange(min(2048, len(content)))
    content[place : place + draw.randint(1, 8)] = draw.randbytes(draw.randint(1, 8))


def edit_end(content, draw):
    """Another byte where a zip has its directory."""
    content[-draw.randrange(1, min(2048, len(content)))] = draw.randrange(256)


def insert(content, draw):
    place = draw.randrange(len(content))
    content[place:place] = draw.randbytes(draw.randint(1, 32))


KINDS = (flip, cut, swap, edit_header, edit_end, insert)


def mutations(whole, times):
    """Changed copies of a file's bytes, as many of each kind."""
    draw, given = random.Random(0), 0
    while given < times:
        content = bytearray(whole)
        KINDS[given % len(KINDS)](content, draw)
        if content != whole:  # a swap of equal bytes is none
            given += 1
            yield bytes(content)


def read_changed(path, whole, times, read, same):
    """Numbers of changed files that were refused, and that were read as they had been written; longest read, s."""
    refused = unharmed = 0
    longest = 0.0
    for content in mutations(whole, times):
        path.write_bytes(content)
        began = time.perf_counter()
        try:
            found = read(path)
        except am.AdaptiveMergeError:
            refused += 1
        else:
            assert same(found), f"mutation {refused + unharmed} was read, and differs from what was written"
            unharmed += 1
        longest = max(longest, time.perf_counter() - began)
    assert refused > 0.6 * times, "most of the mutations changed nothing that is read: the test proves little"
    return refused, unharmed, longest


@pytest.mark.parametrize("times", TIMES)
def test_a_damaged_bank_is_not_read(tmp_path, times, record_property):
    path, bank = tmp_path / "bank.safetensors", parts()[0]
    bank.save(path)

    def same(found):
        tensors = ((found.pretrained, bank.pretrained), (found.vectors, bank.vectors))
        return (found.tasks, found.layout) == (bank.tasks, bank.layout) and all(torch.equal(*pair) for pair in tensors)

    figures = read_changed(path, path.read_bytes(), times, am.TaskVectors.load, same)
    record_property("refused, unharmed, longest s", str(figures))
    assert figures[-1] <= SECONDS


def plain(value):
    """Nested content with tensors as lists, so that `==` compares it."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint], ids=["ours", "Lightning's"])
def test_a_damaged_checkpoint_is_not_read(tmp_path, times, read, record_property):
    bank, toy, heads, images = parts()
    trainer = guarded(tmp_path, max_steps=2)
    trainer.fit(am.TintingPP(bank, toy, heads), datamodule=am.TaskStream(images, 8))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    written = plain(torch.load(path, weights_only=True))
    figures = read_changed(path, path.read_bytes(), times, read, lambda found: plain(found) == written)
    record_property("refused, unharmed, longest s", str(figures))
    assert figures[-1] <= SECONDS


def test_torch_alone_would_read_a_changed_checkpoint(tmp_path):
    """Why we look at the checksums: once torch does it, this test fails, and our look can go."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"filling": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["filling"].any()
    with pytest.raises(am.InputError, match="CRC"):
        AtomicCheckpointIO().load_checkpoint(path)
