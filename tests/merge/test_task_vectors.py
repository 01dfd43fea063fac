import pytest
import torch

import adaptive_merge as am
from adaptive_merge.merge.layout import Layout


def test_experts_are_recovered(bank, experts):
    for task, expert in experts.items():
        for name, value in bank.expert(task).items():
            torch.testing.assert_close(value, expert[name], atol=1e-6, rtol=0)


def test_save_and_load_round_trip(bank, tmp_path):
    bank.save(tmp_path / "bank.safetensors")
    loaded = am.TaskVectors.load(tmp_path / "bank.safetensors")
    assert loaded.tasks == bank.tasks and loaded.names == bank.names
    assert torch.equal(loaded.vectors, bank.vectors) and torch.equal(loaded.pretrained, bank.pretrained)
    assert loaded.fingerprints == bank.fingerprints


def test_every_damage_to_a_saved_bank_is_noticed(bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(whole), (150,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = am.TaskVectors.load(path)
        except am.InputError:
            continue
        assert loaded.fingerprint == bank.fingerprint and loaded.tasks == bank.tasks, position
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(am.InputError, match="bank.safetensors"):
        am.TaskVectors.load(path)


def test_arithmetic(bank):
    torch.testing.assert_close((bank + bank * 0.5 - bank).vectors, 0.5 * bank.vectors)
    assert torch.equal((-bank).vectors, -bank.vectors)
    assert torch.equal(bank.select(["blue", "red"]).vectors, bank.vectors[[2, 0]])
    assert bank.select(["green", "blue"]).vectors.data_ptr() == bank.vectors[1].data_ptr()  # side by side: no copy
    with pytest.raises(am.InputError, match="same tasks"):
        bank + bank.select(["red"])
    with pytest.raises(am.InputError, match="did you mean 'red'"):
        bank.select(["rad"])


def test_fingerprints_tell_banks_apart(bank):
    moved = bank.vectors.clone()
    moved[1, 5] += 1e-3
    other = bank.with_vectors(moved)
    assert other.fingerprints["red"] == bank.fingerprints["red"]
    assert other.fingerprints["green"] != bank.fingerprints["green"]
    assert other.fingerprint != bank.fingerprint


def _without(state):
    state.pop("proj")


def _extra(state):
    state["surplus"] = torch.zeros(2)


def _transposed(state):
    state["proj"] = state["proj"].T


def _nan(state):
    state["stem.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "'proj' is missing"),
        (_extra, "'surplus' is not in"),
        (_transposed, "transposed"),
        (_nan, "'stem.bias' holds NaN"),
    ],
)
def test_bad_experts_are_named(toy, experts, damage, message):
    damage(experts["green"])
    with pytest.raises(am.InputError, match=message) as caught:
        am.TaskVectors.from_state_dicts(toy.state_dict(), experts)
    assert "green" in str(caught.value)


def test_buffers_must_agree_or_are_averaged(toy):
    base = toy.state_dict() | {"count": torch.tensor(3), "running": torch.zeros(2)}
    first, second = dict(base), base | {"running": torch.ones(2)}
    bank = am.TaskVectors.from_state_dicts(base, {"a": first, "b": second}, buffers=["running"])
    assert torch.equal(bank.buffers["running"], torch.full((2,), 0.5)) and bank.buffers["count"] == 3
    assert "running" not in bank.names
    with pytest.raises(am.InputError, match="integer buffer 'count'"):
        am.TaskVectors.from_state_dicts(base, {"a": first, "b": base | {"count": torch.tensor(4)}}, buffers=["running"])


def test_blocks_are_the_largest_numbered_family():
    names = (
        "conv1.0.weight",
        "conv1.2.weight",
        *(f"transformer.resblocks.{i}.{p}" for i in (0, 1, 10) for p in "ab"),
        "proj",
    )
    layout = Layout(names, ((1,),) * len(names))
    expected = [None, None] + [f"transformer.resblocks.{i}" for i in (0, 0, 1, 1, 10, 10)] + [None]
    assert list(layout.blocks) == expected
