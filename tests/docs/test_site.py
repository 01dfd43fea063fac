"""The documentation builds as a site without a warning, and has a place for every name, key and recipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import adaptive_merge as am

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "embedded").glob("*.yaml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a network: nothing but this machine answers."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | nowhere | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert built.returncode == 0 and "WARNING " not in built.stderr, built.stderr[-4000:]
    return folder


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="?(https?://[^">\s]+)', page.read_text()
        )
        assert not loaded, page.name


def test_every_public_name_is_in_the_reference(site):
    ids = {
        name for page in (site / "reference").glob("*.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())
    }
    names = {name: getattr(am, name) for name in am.__dir__() if not name.startswith("_")}
    assert not [name for name, value in names.items() if f"{value.__module__}.{value.__qualname__}" not in ids]


def test_every_key_that_a_recipe_uses_is_in_the_reference(site):
    keys = set(re.findall(r"<td><code>([\w.]+)</code></td>", (site / "reference" / "yaml.html").read_text()))
    used = {
        f"{room}.{key}"
        for recipe in RECIPES
        for room, settings in yaml.safe_load((ROOT / f"configs/embedded/{recipe}.yaml").read_text()).items()
        for key in settings
    }
    assert used <= keys and {"run.select", "suite.banks", "data.protocol"} <= keys
    assert not [key for key in keys if key.endswith(".help")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_card(site, recipe):
    text = (site / "recipes" / f"{recipe}.html").read_text()
    for heading in ("Equations", "Defaults", "Our numbers", "Published"):
        assert f">{heading}<" in text
    assert "94.1</th>" not in text  # the head of a table, not its row of experts


def test_a_link_that_leads_nowhere_is_a_warning(site, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)")
    settings = yaml.safe_load(re.sub(r"(?ms)^nav:.*|^hooks:.*?$", "", (ROOT / "mkdocs.yml").read_text()))
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings | {"plugins": []}))
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode != 0 and "gone.md" in built.stderr
