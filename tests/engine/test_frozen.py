import pytest
import torch
from fitting import fit

import adaptive_merge as am
from adaptive_merge.engine.frozen import FrozenOutputs


def rows_of(index):
    return torch.stack([index.float(), index.float() ** 2], 1)


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_computed_once_and_given_back(tmp_path, on_disk):
    outputs, asked = FrozenOutputs(str(tmp_path) if on_disk else None), []
    for batch in ([3, 1, 7], [7, 2, 3]):
        index = torch.tensor(batch)

        def compute(missing, index=index):
            asked.extend(index[missing].tolist())
            return rows_of(index[missing])

        assert torch.equal(outputs.rows("a", "expert", {"expert": "x"}, 10, index, compute), rows_of(index))
    assert asked == [3, 1, 7, 2]


def test_a_second_run_reuses_the_files_and_notices_foreign_ones(tmp_path):
    index = torch.arange(5)
    first = FrozenOutputs(str(tmp_path))
    first.rows("../../a", "expert", {"expert": "x"}, 5, index, lambda missing: rows_of(missing))
    first.flush()
    assert {path.parent for path in tmp_path.rglob("*")} == {tmp_path}

    second = FrozenOutputs(str(tmp_path))
    assert torch.equal(
        second.rows("../../a", "expert", {"expert": "x"}, 5, index, lambda _: pytest.fail("computed")), rows_of(index)
    )
    for identity, size, what in (({"expert": "y"}, 5, "expert"), ({"expert": "x"}, 6, "images")):
        with pytest.raises(am.InputError, match=f"are of another {what}"):
            FrozenOutputs(str(tmp_path)).rows("../../a", "expert", identity, size, index, rows_of)


def test_what_was_not_flushed_is_computed_again(tmp_path):
    index = torch.arange(5)
    FrozenOutputs(str(tmp_path)).rows("a", "expert", {}, 5, index, rows_of)
    again = []
    FrozenOutputs(str(tmp_path)).rows(
        "a", "expert", {}, 5, index, lambda missing: again.append(missing) or rows_of(missing)
    )
    assert len(again[0]) == 5


def test_cached_runs_equal_uncached_ones(toy, bank, heads, images, tmp_path):
    def learned(**settings):
        torch.manual_seed(0)
        module = am.Surgery(bank, toy, heads, rank=2, **settings)
        fit(module, images)
        return module.state_dict()

    runs = [learned(), learned(cache=str(tmp_path)), learned(cache=str(tmp_path))]
    assert all(torch.equal(runs[0][name], run[name]) for run in runs for name in run)
    other = bank.with_vectors(bank.vectors * 1.5)
    with pytest.raises(am.InputError, match="choose another cache folder"):
        fit(am.Surgery(other, toy, heads, rank=2, cache=str(tmp_path)), images)


def filled(folder, size=700):
    outputs, index = FrozenOutputs(str(folder)), torch.arange(size)
    for part in index.split(100):
        outputs.rows("a", "expert", {"expert": "x"}, size, part, lambda missing, part=part: rows_of(part[missing]))
    outputs.flush()
    return {path.suffix: path for path in folder.iterdir()}


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def zeroed(path):
    size = path.stat().st_size
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGE = {
    "first byte": lambda files: flipped(files[".f32"], 0),
    "a byte in the middle": lambda files: flipped(files[".f32"], 700 * 4),
    "last byte": lambda files: flipped(files[".f32"], -1),
    "truncated": lambda files: files[".f32"].write_bytes(files[".f32"].read_bytes()[:-8]),
    "empty": lambda files: files[".f32"].write_bytes(b""),
    "zeros": lambda files: zeroed(files[".f32"]),
    "longer": lambda files: files[".f32"].write_bytes(files[".f32"].read_bytes() + b"1234"),
    "gone": lambda files: files[".f32"].unlink(),
    "note flipped": lambda files: flipped(files[".note"], 200),
    "note truncated": lambda files: files[".note"].write_bytes(files[".note"].read_bytes()[:-3]),
    "note empty": lambda files: files[".note"].write_bytes(b""),
    "note gone": lambda files: files[".note"].unlink(),
    "an old note, without checksums": lambda files: files[".note"].rename(files[".note"].with_suffix(".known")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damaged_row_is_believed(tmp_path, caplog, damage):
    DAMAGE[damage](filled(tmp_path))
    again, asked = FrozenOutputs(str(tmp_path)), []

    def compute(missing):
        asked.extend(missing.tolist())
        return rows_of(missing)

    index = torch.arange(700)
    for _ in range(2):
        assert torch.equal(again.rows("a", "expert", {"expert": "x"}, 700, index, compute), rows_of(index))
    silent = "gone" in damage and "note" in damage or "old" in damage
    assert (len(caplog.records) == 1 and "damaged" in caplog.text) or silent
    assert asked and len(asked) == len(set(asked))
    again.flush()
    third = FrozenOutputs(str(tmp_path))
    assert torch.equal(
        third.rows("a", "expert", {"expert": "x"}, 700, index, lambda _: pytest.fail("computed")), rows_of(index)
    )


def test_only_the_block_that_was_changed_is_computed_anew(tmp_path):
    flipped(filled(tmp_path)[".f32"], 300 * 8)  # a row is two numbers
    asked = []
    index = torch.arange(700)
    FrozenOutputs(str(tmp_path)).rows(
        "a", "expert", {"expert": "x"}, 700, index, lambda m: asked.extend(m.tolist()) or rows_of(m)
    )
    assert asked == list(range(256, 512))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"width": "2"}', '{"width": 0}', "\x00", '{"width": -1}']
)
def test_a_damaged_header_is_one_message(tmp_path, content):
    filled(tmp_path)[".json"].write_text(content)
    with pytest.raises(am.InputError, match="not the header of a table of cached outputs; .* remove the cache folder"):
        FrozenOutputs(str(tmp_path)).rows("a", "expert", {"expert": "x"}, 700, torch.arange(3), rows_of)


def test_what_scoring_asks_is_kept_as_well(toy, bank, heads, images, tmp_path):
    import pytorch_lightning as pl

    silent = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    found = []
    for _ in range(2):
        module = am.TaskArithmetic(bank, toy, heads)
        module.views.outputs.folder = tmp_path
        found.append(am.score(pl.Trainer(**silent), module, am.TaskStream(images)))
    assert found[0] == found[1] and len(list(tmp_path.glob("*.note"))) >= 3
