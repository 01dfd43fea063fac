from pathlib import Path

import pytest
from browser import Browser, find
from sample_runs import HOSTILE, routed, start_only, write_run

from adaptive_merge.report.html import write_report

SIZES = (
    "[...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect()).map((r) => [r.width, r.height])"
)
COLUMN = "[...document.querySelector('#all-runs').tBodies[0].rows].map((row) => row.cells[{}].textContent.trim())"
CLICK = "document.querySelector('#all-runs').tHead.rows[0].cells[{}].querySelector('button').click()"
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
LOOK = (Path(__file__).parent / "look.js").read_text()
GROUND = "getComputedStyle(document.body).backgroundColor"
INK = "getComputedStyle(document.querySelector('figure svg text')).fill"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find()
    if binary is None:
        pytest.skip("no Chromium on this machine: install the package chromium of your system to run this")
    started = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / f"run{seed}", seed=seed, recipe="ab"[seed % 2]) for seed in range(3)]
    hostile = write_run(folder / "hostile", HOSTILE)
    return {
        "one": write_report(runs[:1], folder / "one.html"),
        "start": write_report([start_only(folder / "start")], folder / "start.html"),
        "routed": write_report([routed(folder / "routed")], folder / "routed.html"),
        "hostile": write_report([hostile], folder / "hostile.html"),
        "several": write_report(runs, folder / "several.html"),
    }


@pytest.mark.parametrize("width", [360, 768, 1600])
@pytest.mark.parametrize("name", ["one", "start", "routed", "hostile", "several"])
def test_a_page_is_quiet_and_has_no_hole(browser, pages, name, width):
    """No error or request, nothing that overflows without a cue, no empty cell, contrast as WCAG's AA asks."""
    for scheme in ("light", "dark"):
        browser.shape(width, scheme)
        browser.open(pages[name])
        browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.evaluate(PAINTED)
        assert browser.complaints() == [] and browser.evaluate(LOOK) == []
    sizes = browser.evaluate(SIZES)
    assert len(sizes) >= 7 and all(wide > 200 and high > 60 for wide, high in sizes)
    # In the wide layout, figures stand side by side.
    lefts = browser.evaluate("new Set([...document.querySelectorAll('figure')].map((f) => f.offsetLeft)).size")
    assert lefts == 1 if width == 360 else lefts >= width // 768


def test_the_look_finds_what_is_wrong(browser, pages, tmp_path):
    page = pages["one"].read_text()
    for number, (old, new, words) in enumerate(
        (
            (".card { flex: 1 1", ".card { flex: 0 1", "ends"),
            ("--muted: #5c6773", "--muted: #b0b8c0", "contrast"),
            ("[data-scrolls] + .cue", ".nothing", "without a cue"),
            ("</td></tr>", "</td><td></td></tr>", "empty cell"),
        )
    ):
        assert old in page
        spoilt = tmp_path / f"{number}.html"
        spoilt.write_text(page.replace(old, new))
        browser.shape(360 if words == "without a cue" else 1600, "light")
        browser.open(spoilt)
        assert any(words in one for one in browser.evaluate(LOOK)), words


def test_both_schemes_and_the_switch(browser, pages):
    seen = {}
    for scheme in ("light", "dark"):
        browser.shape(1200, scheme)
        browser.open(pages["one"])
        seen[scheme] = (browser.evaluate(GROUND), browser.evaluate(INK))
        browser.evaluate("document.getElementById('scheme').click()")
        seen[scheme, "switched"] = (browser.evaluate(GROUND), browser.evaluate(INK))
    assert seen["light"] == seen["dark", "switched"] != seen["dark"] == seen["light", "switched"]
    for ground, ink in seen.values():
        assert contrast(ground, ink) > 7


def test_tables_sort(browser, pages):
    browser.shape(1600, "light")
    browser.open(pages["several"])
    for column, number in ((0, False), (3, True), (6, True)):
        before = browser.evaluate(COLUMN.format(column))
        key = (lambda text: float(text.rstrip(" %"))) if number else str
        orders = []
        for _ in range(2):
            browser.evaluate(CLICK.format(column))
            orders.append(browser.evaluate(COLUMN.format(column)))
        wanted = sorted(before, key=key)
        assert orders in ([wanted[::-1], wanted], [wanted, wanted[::-1]])
    assert browser.complaints() == []


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two `rgb(r, g, b)`."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    bright, dark = sorted((light(first), light(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
