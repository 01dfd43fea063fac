"""Hooks of mkdocs: what the site has beside the pages of docs/, made from what the repository holds already.

The home page is README.md; notebooks become pages; each recipe of configs/embedded has a card, of its file, the parts
that it names (docs/cards.yaml), and the rows that other pages have of it; the reference is made of `am.*` and of the
parser.
Links keep the form that they have in the repository and are turned to the site's pages here.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import adaptive_merge as am
from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.cli.recipes import _header, _learns

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs" / "embedded").glob("*.yaml"))
# Pages of the site that are files elsewhere in the repository.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "configs/clip/README.md": "clip.md",
    "adaptive_merge/suites/embedded/README.md": "embedded.md",
    **{
        f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "docs/notebooks").glob("*.ipynb")
    },
}
# Files that a page may name and the site does not show: the link becomes plain text.
UNSEEN = ("LICENSE", "CITATION.cff")
PARTS = ("transforms", "coefficients", "adapters", "objectives", "starts")
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
ROW = re.compile(r"^\| (?:\[?`(?P<recipe>\w+)`)")
NUMBERS = ("results.md", "transforms.md", "routes.md", "sample_efficiency.md")


def on_config(config: MkDocsConfig) -> None:
    """Fill the two parts of the navigation that are generated."""
    cards = ["recipes/index.md", *(f"recipes/{path.stem}.md" for path in RECIPES)]
    reference = [{"Python": "reference/python.md"}, *({part.capitalize(): f"reference/{part}.md"} for part in PARTS)]
    generated = {"Recipes": cards, "Reference": [*reference, {"YAML": "reference/yaml.md"}]}
    for entry in config.nav or []:
        ((title, pages),) = entry.items()
        pages[:] = generated.get(title, pages)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated or lies outside of docs/."""
    pages = {page: _text(ROOT / source) for source, page in ELSEWHERE.items()} | dict(_cards()) | dict(_reference())
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links as the repository has them → pages of the site."""
    here = page.file.src_uri
    source = next((source for source, name in ELSEWHERE.items() if name == here), f"docs/{here}")
    return LINK.sub(lambda link: _link(link, posixpath.dirname(source), posixpath.dirname(here)), markdown)


def _link(link: re.Match[str], source: str, here: str) -> str:
    target, _, anchor = link["target"].partition("#")
    if not target or "://" in target:
        return link[0]
    path = posixpath.normpath(posixpath.join(source, target))
    if path in UNSEEN:
        return link["text"]
    recipe = re.fullmatch(r"configs/embedded/(\w+)\.yaml", path)
    page = f"recipes/{recipe[1]}.md" if recipe else ELSEWHERE.get(path, path.removeprefix("docs/"))
    return f"[{link['text']}]({posixpath.relpath(page, here or '.')}{'#' * bool(anchor)}{anchor})"


def _text(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text().replace("](docs/images/", "](images/")
    cells = json.loads(path.read_text())["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts)


def _cards() -> Iterator[tuple[str, str]]:
    """A page for each recipe, and their list."""
    parts, published = (yaml.safe_load((ROOT / "docs/cards.yaml").read_text())[key] for key in ("parts", "published"))
    numbers = _numbers()
    lines = []
    for path in RECIPES:
        title, source = _header(path)
        settings = yaml.safe_load(path.read_text())
        lines.append(f"| [`{path.stem}`]({path.stem}.md) | {title} |")
        body = path.read_text().splitlines()
        while body[0].startswith("#"):
            body.pop(0)
        used = [parts[name] | {"name": name} for name in _classes(settings["model"])]
        traps = [f"- {one['trap']}" for one in used if "trap" in one]
        yield (
            f"recipes/{path.stem}.md",
            "\n".join(
                [
                    f"# `{path.stem}`\n\n{title} {_learns(settings['model'])}\n",
                    "## Equations\n",
                    *(_part(one) for one in used),
                    "\n## Defaults\n\n```yaml",
                    *body,
                    f"```\n\n    adaptive-merge fit --config {path.stem}\n",
                    *(["## Traps\n", *traps, ""] if traps else []),
                    "## Our numbers\n",
                    *(numbers.get(path.stem) or ["Not in the tables of this documentation yet."]),
                    f"\n## Published\n\n{source or 'Not a published method as it stands; the parts are.'}\n",
                    *_published(published.get(path.stem, [])),
                ]
            ),
        )
    yield "recipes/index.md", "# Recipes\n\n| recipe | what it is |\n|---|---|\n" + "\n".join(lines)


def _classes(model: Mapping[str, Any]) -> list[str]:
    """The classes that a model names, those inside of others too, in the order of the merge and each once."""
    order = ("transforms", "start", "coefficients", "adapters", "objective", "stages")
    found = [name for key in order for name in _named(model.get(key))]
    return list(dict.fromkeys(found))


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, str) and re.fullmatch(r"[A-Z]\w+", value):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _named(inner)


def _part(part: Mapping[str, str]) -> str:
    where = _home(part["name"])
    more = f" More: [{_title(part['page'])}](../{part['page']})." if "page" in part else ""
    equation = html.escape(part["equation"].replace("`", ""), quote=False)
    return f"[`{part['name']}`][{where}]\n\n<p><code>{equation}</code></p>\n\n{part['source']}.{more}\n"


def _title(page: str) -> str:
    """What a page is headed, up to its colon."""
    return (ROOT / "docs" / page.partition("#")[0]).read_text().partition("\n")[0].lstrip("# ").partition(":")[0]


def _home(name: str) -> str:
    value = getattr(am, name)
    return f"{value.__module__}.{value.__qualname__}"


def _published(rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    head = ["| checkpoints, eight tasks | ViT-B/32 | ViT-B/16 | ViT-L/14 |", "|---|---|---|---|"]
    return head + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _numbers() -> dict[str, list[str]]:
    """Recipe → its rows in the tables of other pages, each below the heading that it stands under."""
    found: dict[str, list[str]] = {}
    for page in NUMBERS:
        heading, head = "", ""
        for line in (ROOT / "docs" / page).read_text().splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            elif line.startswith("|---"):
                continue
            elif (row := ROW.match(line)) and head:
                table = [f"{text.partition(' | ')[2]}" for text in (head, line)]
                rule = "|---" * (table[0].count(" |")) + "|"
                link = f"[{heading}](../{page})"
                found.setdefault(row["recipe"], []).append(f"{link}:\n\n| {table[0]}\n{rule}\n| {table[1]}\n")
            elif line.startswith("|") and not row:
                head = head or line
            elif not line.startswith("|"):
                head = ""
    return found


def _reference() -> Iterator[tuple[str, str]]:
    """Pages of `am.*`, by part, and of the keys of a configuration."""
    names = [name for name in am.__dir__() if name[0] != "_"]
    rooms: dict[str, list[str]] = {}
    for name in names:
        room = getattr(am, name).__module__.split(".")[1]
        rooms.setdefault(room if room in PARTS else "python", []).append(name)
    for room, members in rooms.items():
        title = "Names of `adaptive_merge`" if room == "python" else room.capitalize()
        intro = "`import adaptive_merge as am` gives these names at once." if room == "python" else ""
        body = "\n\n".join(f"::: {_home(name)}" for name in sorted(members, key=str.lower))
        yield f"reference/{room}.md", f"# {title}\n\n{intro}\n\n## Names\n\n{body}\n"
    yield "reference/yaml.md", _keys()


def _keys() -> str:
    """Every key of a configuration, as the parser of `fit` knows it."""
    text = {"recipe": "reference", "coefficients": {"class_path": "Fixed"}}
    parser = AdaptiveMergeCLI(args=["--config", json.dumps({"model": text})], run=False).parser
    rows: dict[str, list[str]] = {}
    for action in parser._actions:
        key = next((option[2:] for option in action.option_strings if option.startswith("--")), "")
        room, _, name = key.partition(".")
        if not name or name.split(".")[-1] == "help" or "+" in key:
            continue
        kind = str(getattr(action, "_typehint", None) or getattr(action, "type", ""))
        kind = re.sub(r"[\w.]*\.(\w+)", r"\1", re.sub(r"<class '([^']*)'>", r"\1", kind))
        kind = html.escape(kind.replace("NoneType", "null").replace("|", "or"), quote=False)
        words = html.escape(" ".join((action.help or "").split()), quote=False).replace("|", "\\|")
        default = "" if action.default is None else f"`{json.dumps(_plain(action.default))}`"
        rows.setdefault(room, []).append(f"| `{key}` | {kind} | {default} | {words} |")
    intro = "Each is an option of the command line too: `--model.lr 0.01`. A class is given by its name and arguments, "
    intro += "`{class_path: Ties, init_args: {density: 0.2}}`; the names are on the pages beside this one.\n"
    head = "| key | values | default | meaning |\n|---|---|---|---|\n"
    rooms = sorted(rows, key=lambda room: room == "trainer")  # Lightning's own keys last
    return f"# Keys of a configuration\n\n{intro}\n" + "\n\n".join(
        f"## {room}\n\n{head}" + "\n".join(rows[room]) for room in rooms
    )


def _plain(value: Any) -> Any:
    """A default as YAML has it."""
    return value if isinstance(value, (bool, int, float, str, list, dict, tuple)) else str(value)
