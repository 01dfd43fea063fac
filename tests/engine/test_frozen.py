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
