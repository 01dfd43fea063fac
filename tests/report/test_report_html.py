import json
import re

import pytest
from sample_runs import HOSTILE, change, routed, start_only, write_run

import adaptive_merge as am
from adaptive_merge.cli.report import report as report_command
from adaptive_merge.privacy import HIDDEN, scrub
from adaptive_merge.report.html import report_run, write_report
from adaptive_merge.report.summary import warnings_of
from adaptive_merge.runs.reading import read_run

ADDRESS = re.compile(r"""https?://|\b(?:src|href)\s*=\s*["']?(?!#|data:)|url\((?!#)|@import|<link|<iframe""", re.I)


OPTIONAL = ("config.yaml", "metrics.csv", "history.safetensors", "diagnostics.safetensors")


def page_of(folder, **options):
    return write_report([folder], folder / "report.html", **options).read_text()


def test_a_report_is_self_contained_and_has_all_figures(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    body = page.split("</style>")[1]
    assert not ADDRESS.search(body) and "http" not in page.split("<style>")[0].replace("http-equiv", "")
    assert page.count("<figure") == page.count("<svg") == 18
    for words in ("adapted accuracy", "Reliability", "seed_everything: 0", "ab" * 32, "2.15.0"):
        assert words in page
    assert "Left out" not in page
    assert page == page_of(tmp_path / "run")


def test_hostile_names_are_escaped_everywhere(tmp_path):
    folder = write_run(tmp_path / "run", HOSTILE, recipe="</script><script>alert(2)</script>")
    with (folder / "config.yaml").open("a") as file:
        file.write("note: '</pre><script>alert(3)</script>'\n")
    page = page_of(folder)
    assert page.count("<script") == 1 and page.count("</script") == 1
    assert page.count("<figure") >= 14 and "could not be drawn" not in page
    assert "\u202e" not in page and "\x00" not in page and "x" * 70 not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_missing_parts_leave_a_note_in_place_of_their_figures(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in OPTIONAL:
        (folder / name).unlink()
        assert any(note.startswith(f"{name} is not there") for note in read_run(folder).notes)
    page = page_of(folder)
    assert page.count("<figure") == 2 and page.count("is not there") == 4


@pytest.mark.parametrize("name", OPTIONAL)
def test_damaged_parts_do_not_stop_the_report(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(b"step,train/loss\n{: [\xff")
    assert [note.split()[0] for note in read_run(folder).notes] == [name]


def test_a_figure_that_fails_becomes_a_note(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    for name in OPTIONAL:
        (folder / name).unlink()
    monkeypatch.setattr("adaptive_merge.report.figures.accuracy_bars", lambda *_: 1 / 0)
    page = page_of(folder)
    assert page.count("<figure") == 1 and "could not be drawn (ZeroDivisionError)" in page


def test_what_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(am.MissingFileError, match=r"results\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    broken = {"schema": 1, "tasks": {"a": {"n": 1}}}
    for content in ("{", "[]", '{"schema": 2}', json.dumps(broken)):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(am.InputError, match="not results of this version"):
            write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(am.InputError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert report_run(tmp_path / "nowhere") is None


def test_several_runs_are_compared(tmp_path, monkeypatch):
    # With many runs, only the comparison carries figures.
    monkeypatch.setattr("adaptive_merge.report.html._DETAILED", 5)
    runs = [
        write_run(tmp_path / f"{recipe}{seed}", seed=seed, recipe=recipe, better=better)
        for recipe, better in (("good", 0.1), ("poor", 0.0))
        for seed in range(3)
    ]
    page = write_report(runs, tmp_path / "all.html").read_text()
    assert "best method" in page and "good" in page and "p over seeds" in page and "0.250" in page
    rows = re.search(r'id="all-runs".*?</table>', page, re.S)[0]
    assert rows.count("<tr><td>") == 6
    assert not ADDRESS.search(page.split("</style>")[1])
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len({name for name in ids if "-figure_" in name}) == page.count("<svg")


def test_warnings_name_what_went_wrong(tmp_path):
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / "results.json").read_text())
    content["tasks"]["mnist"] |= {"adapted": 0.3, "n": 12}
    content["tasks"]["fashion"] |= {"pretrained": 0.99}
    (folder / "results.json").write_text(json.dumps(content))
    told = " ".join(warnings_of(read_run(folder)))
    assert "mnist: adaptation lost 30.0 points" in told and "mnist: the pre-trained model beats" in told
    assert "fashion: the expert is worse than the pre-trained model" in told and "mnist (12)" in told
    assert "kmnist" not in told


def test_secrets_are_scrubbed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value-1234")
    folder = write_run(tmp_path / "run")
    for name in OPTIONAL[1:]:
        (folder / name).unlink()
    with (folder / "config.yaml").open("a") as file:
        file.write("logger: {api_key: abcdef123, entity: me, note: 'x s3cr3t-value-1234', url: 'ftp://u:pw@host/'}\n")
    page = page_of(folder)
    assert "abcdef123" not in page and "s3cr3t" not in page and "u:pw" not in page and "entity: me" in page
    assert scrub({"tokenizer": "bpe", "hf_token": "x", "keys": ["a"], "monkey": 1, "token": None, "lr": 1.0}) == {
        "tokenizer": "bpe",
        "hf_token": HIDDEN,
        "keys": [HIDDEN],
        "monkey": 1,
        "token": None,
        "lr": 1.0,
    }


def test_the_command_writes_into_the_run_or_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_run(tmp_path / name, seed=seed)
        for part in OPTIONAL:
            (tmp_path / name / part).unlink()
    report_command(["a", "--no-tsne"])
    assert (tmp_path / "a" / "report.html").is_file() and "wrote a/report.html" in capsys.readouterr().out
    report_command(["a", "b", "--output", "both.html", "--no-tsne"])
    assert "2 runs" in (tmp_path / "both.html").read_text()


def test_a_start_is_told_with_its_choice(tmp_path):
    folder = start_only(tmp_path / "run")
    start = json.loads((folder / "results.json").read_text())["start"]
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert "ChosenRegression&lt; (seed 0), solved from 64 unlabelled images a task" in page
    assert "The static merge before it: 55.0 %; after it, before the first step: 60.0 %" in page
    assert (
        "strength 0.3</bdi> (chosen)" in page
        and "strength 0.1</bdi></td>" in page
        and "stem" not in page.split("nats")[1]
    )
    assert "Of 2 settings, strength 0.3 were chosen without labels" in page
    assert "0.0400 nats, of 0.0400 to 0.0600 in all" in page and "the start gave" in page
    # What came before the start is the merge that gains are over; the start has a column of its own.
    assert re.search(r">merged<.*>start<", re.search(r'id="tasks-r0".*?</thead>', page, re.S)[0], re.S)
    for damage in ({"images": {}}, {"settings": []}):
        change(folder, start=start | damage)
        with pytest.raises(am.InputError, match="start"):
            write_report([folder], tmp_path / "page.html")


def test_routes_and_masks_are_shown(tmp_path):
    page = page_of(routed(tmp_path / "run"))
    assert page.count("<figure") == 20 and "Routes by task" in page and "What the mask keeps, by depth" in page
    rows = re.search(r">accuracy, task unknown</th>.*?</table>", page, re.S)[0]
    assert rows.count("<tr>") == 4 and rows.count("80.0 %") == rows.count("60.0 %") == 4
    assert "20 % over all tasks and parameters" in page


@pytest.mark.parametrize(
    "fields",
    [
        {"routing": {"tasks": {"mnist": {"routing": 1.0}}}},
        {"routing": {"tasks": {}, "average": {"routing": "x", "known": 1, "unknown": 1}}},
        {"kept": {"mnist": {"a": "x"}}},
        {"kept": {"mnist": {}}},
        {"kept": {"mnist": {"a": 1.0}, "fashion": {"b": 1.0}}},
    ],
)
def test_damaged_routes_and_masks_are_refused(tmp_path, fields):
    with pytest.raises(am.InputError, match="not results of this version"):
        read_run(change(routed(tmp_path / "run"), **fields))


def test_ahead_is_said_only_where_a_test_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptive_merge.report.html._DETAILED", 0)
    near = [write_run(tmp_path / name, seed=1, recipe=name) for name in ("one", "two")]
    page = write_report(near, tmp_path / "near.html").read_text()
    assert "not told apart from" in page and "ahead of the next" not in page
    far = [near[0], write_run(tmp_path / "far", seed=1, recipe="far", better=0.15)]
    page = write_report(far, tmp_path / "far.html").read_text()
    assert "ahead of the next by" in page and "binomial, 1,500 images" in page and "not told apart" not in page
