"""The page of results and the script that writes it."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import results_page

        yield results_page
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_no_cell_of_the_results_is_empty(page):
    for name in ("overview", "axes", *page.PROTOCOLS):
        head, _, *rows = [line for line in page.between(name).splitlines() if line]
        assert len(rows) > 5
        for row in (head, *rows):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert len(cells) == head.count("|") - 1 and not {"", "–"} & set(cells), row


def test_a_row_without_runs_stays_as_the_page_has_it(page, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "RUNS", tmp_path)
    page.load.cache_clear()
    try:
        made = page.tables()
    finally:
        page.load.cache_clear()
    for protocol, rows in made.items():
        text = page.markdown(page.columns(protocol), list(rows.values()), lambda row, name: page.NOT_RECORDED)
        assert text == page.between(protocol).strip()
    assert page.overview(made) == page.between("overview").strip()


def test_the_tables_of_the_readme_are_those_of_the_page(page):
    made, text = {protocol: page.on_page(protocol) for protocol in page.PROTOCOLS}, (ROOT / "README.md").read_text()
    assert page.readme(made, text) == text
    mean = "mean accuracy, %"
    for name, held_out, transductive in (("ties", "1.0", "2.0"), ("start_best", "3.0 ± 0.1", "4.0")):
        made["holdout"][name][mean], made["transductive"][name][mean] = held_out, transductive
    lines = page.readme(made, text).splitlines()
    assert "| `ties` | nothing | 1.0 | 2.0 | 72.4 |" in lines
    changed = [line for line in lines if line not in text.splitlines()]
    assert len(changed) == 2 and "| 3.0 ± 0.1 | 4.0 |" in changed[1]


def test_the_best_is_that_of_the_table_and_not_of_the_runs_at_hand(page, monkeypatch):
    groups = {"a": page.Group("a", [object()]), "b": page.Group("b", [])}
    monkeypatch.setattr(page, "load", lambda protocol, method: groups[method])
    mean, p = "mean accuracy, %", "p against the best"
    known = {"a": {mean: "70.0", p: "0.02"}, "b": {mean: "90.0 ± 0.1", p: page.BEST}}
    rows = page.tested("holdout", {name: dict(cells) for name, cells in known.items()}, known)
    assert rows["b"][p] == page.BEST and rows["a"][p] == page.NOT_RECORDED


def test_the_plan_has_every_recipe_and_what_is_asked_for_alone(page):
    import reproduce

    options = argparse.Namespace(protocol=list(reproduce.PROTOCOLS), methods=None, seeds=None)
    jobs = reproduce.jobs(options)
    assert (
        len(set(jobs)) == len(jobs)
        and len(reproduce.TWENTY) == len(set(reproduce.TWENTY) & set(reproduce.methods())) == 20
    )
    assert {method for protocol, method, _ in jobs if protocol == "holdout"} == set(reproduce.methods())
    assert ("holdout", "best", 2) in jobs and ("holdout", "ties", 1) not in jobs and ("unseen", "best", 0) in jobs
    options = argparse.Namespace(protocol=["online"], methods=["best", "surgery_adamerging"], seeds=[4])
    assert reproduce.jobs(options) == [("online", "task_arithmetic", 4), ("online", "best", 4)]


def test_a_run_that_fails_does_not_stop_the_others(page, tmp_path, monkeypatch, capsys):
    import reproduce
    import results_page

    def timed(command):
        folder = tmp_path / "holdout" / command[command.index("--run.name") + 1]
        if folder.name == "ties-0":
            return 2, 0.0, "adaptive-merge: no"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        return 0, 1.0, "a table"

    monkeypatch.setattr(reproduce, "RUNS", tmp_path)
    monkeypatch.setattr(reproduce, "timed", timed)
    monkeypatch.setattr(results_page, "write_page", lambda: "written")
    monkeypatch.setattr("sys.argv", ["", "--protocol", "holdout", "--methods", "ties", "tsvm", "--jobs", "1"])
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        reproduce.main()
    assert sorted(path.name for path in (tmp_path / "holdout").iterdir()) == ["task_arithmetic-0", "tsvm-0"]
    said = capsys.readouterr()
    assert "written" in said.out and "ties, seed 0, ended with 2:\nadaptive-merge: no" in said.err


def test_what_a_frozen_merge_says_is_kept_by_run_and_what_experts_say_is_shared(page):
    import reproduce

    for run, places in (("surgery_ta-0", 3), ("start_surgery-0", 3), ("surgery_v2-0", 1), ("best-0", 1)):
        found = {reproduce.cache_of("holdout", run), reproduce.cache_of("unseen", run)}
        found.add(reproduce.cache_of("holdout", run.replace("-0", "-1")))
        assert len(found) == places, run


def test_the_front_has_what_no_other_beats(page):
    from results_figures import front

    points = {"free": (0, 70), "poor": (5, 60), "mid": (5, 80), "same": (9, 80), "best": (9, 90)}
    assert front(points) == ["free", "mid", "best"]


def test_a_quadratic_fit_finds_its_function_and_the_front_its_corner(page):
    import coefficient_front as front

    random = np.random.default_rng(0)
    coefficients, weights = random.random((20, 2)), random.normal(size=(6, 2))
    values = front.predict(coefficients, weights)
    assert np.allclose(front.fit(coefficients, values), weights)
    assert np.allclose(front.explained(coefficients, values, weights), 1)
    rows = np.array([[1, 1], [2, 0], [0, 2], [1, 0.5], [2, 0]])
    assert front.front(rows).tolist() == [1, 0, 2]
    assert front.grid(3).shape == (26**3, 3)
