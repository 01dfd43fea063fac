"""Links of the pages in the repository lead to what is there, and from README soon to what is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "configs/clip/README.md",
    ROOT / "adaptive_merge/suites/embedded/README.md",
]
LINK = re.compile(r"\[[^\]]*(?:\[[^\]]*\][^\]]*)*\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
# What a reader of README looks for → a word that the section it is in has.
WANTED = {
    "docs/experts.md#lora": "PEFT",
    "docs/transforms.md#one-of-your-own": "am.Transform",
    "docs/protocols.md#protocols": "Holdout(share, seed)",
    "docs/results.md": "recipe",
}


def links(page: Path) -> set[str]:
    """Targets in the repository, as path#anchor from its root; others are left out."""
    found = set()
    for target in LINK.findall(CODE.sub("``", page.read_text())):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            found.add(f"{file.relative_to(ROOT)}{'#' * bool(anchor)}{anchor}")
    return found


def sections(page: Path) -> dict[str, str]:
    """Anchor → the text below its heading, up to the next one."""
    text = re.sub(r"^ *```.*?^ *```$", lambda code: code[0].replace("\n#", "\n "), page.read_text(), flags=re.M | re.S)
    _, *parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    names = (re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in parts[::2])
    return dict(zip(names, parts[1::2]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    missing = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = ROOT / path
        if not file.exists() or anchor and anchor not in sections(file):
            missing.append(target)
    assert not missing


def test_what_is_asked_for_is_near():
    """In three links from README, and it is there."""
    near = links(ROOT / "README.md")
    for _ in range(2):
        pages = {ROOT / target.partition("#")[0] for target in near}
        near |= {target for page in pages if page.suffix == ".md" for target in links(page)}
    for target, word in WANTED.items():
        path, _, anchor = target.partition("#")
        text = sections(ROOT / path)[anchor] if anchor else (ROOT / path).read_text()
        assert target in near and word in text
