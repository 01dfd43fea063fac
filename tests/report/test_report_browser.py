import pytest
from browser import Browser, find
from sample_runs import HOSTILE, write_run

from adaptive_merge.report.html import write_report

SIZES = (
    "[...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect()).map((r) => [r.width, r.height])"
)
COLUMN = "[...document.querySelector('#all-runs').tBodies[0].rows].map((row) => row.cells[{}].textContent.trim())"
CLICK = "document.querySelector('#all-runs').tHead.rows[0].cells[{}].querySelector('button').click()"
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
        "hostile": write_report([hostile], folder / "hostile.html"),
        "several": write_report(runs, folder / "several.html"),
    }


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["one", "hostile", "several"])
def test_a_page_is_quiet_and_shows_every_figure(browser, pages, name, width):
    browser.shape(width, "light")
    browser.open(pages[name])
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    sizes = browser.evaluate(SIZES)
    assert browser.complaints() == []
    assert len(sizes) >= 14 and all(wide > 200 and high > 60 for wide, high in sizes)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # In the wide layout, figures stand side by side.
    assert (
        width == 360
        or browser.evaluate(
            "new Set([...document.querySelectorAll('figure')].map((f) => f.getBoundingClientRect().left)).size"
        )
        >= 3
    )


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
