"""The plan of the house: which rooms the package has, on which floor each stands, and that no import runs back up.

A room is a file or folder right under `adaptive_merge/`; an import anywhere in it, also inside a function, counts. A
room stands one floor above the highest room that it imports. `python scripts/imports.py` prints the plan and exits with
1 where rooms import each other in a circle, or where there are more rooms or floors than agreed.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "adaptive_merge"
MOST_ROOMS, MOST_FLOORS = 26, 11
# The package's face hands names on, and is imported for `__version__` alone.
FACE = "__init__"


def module_of(path: Path) -> str:
    """The dotted name of a file, without the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(path: Path) -> set[str]:
    """Dotted names under the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            base = node.module.partition(".")[2]
            found |= {f"{base}.{alias.name}".strip(".") for alias in node.names}
    return found


def graph(depth: int) -> dict[str, set[str]]:
    """Room → the rooms that it imports; `depth` 1 takes a folder for one room, a large one takes files."""
    modules = {module_of(path): path for path in PACKAGE.rglob("*.py")}

    def room(name: str) -> str | None:
        while name and name not in modules and name.partition(".")[0] not in {m.partition(".")[0] for m in modules}:
            name = name.rpartition(".")[0]
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        return ".".join(name.split(".")[:depth]) or None

    rooms: dict[str, set[str]] = {}
    for name, path in modules.items():
        if name == FACE:
            continue
        own = ".".join(name.split(".")[:depth])
        others = {room(other) for other in imported(path) if other != "__version__"}
        rooms.setdefault(own, set()).update(others - {own, None})
    return rooms


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """Room → its floor, from 1.

    Raises:
        CycleError: rooms that import each other in a circle; they are its second argument.
    """
    floor: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floor[room] = 1 + max((floor[other] for other in rooms.get(room, ())), default=0)
    return floor


def main() -> int:
    """Print the plan; the exit status."""
    try:
        plan = floors(graph(1))
        floors(graph(99))
    except CycleError as error:
        sys.stderr.write(f"a circle of imports: {' -> '.join(error.args[1])}\n")
        return 1
    for number in range(max(plan.values()), 0, -1):
        print(f"floor {number:2}  {', '.join(sorted(room for room, floor in plan.items() if floor == number))}")
    print(f"{len(plan)} rooms on {max(plan.values())} floors")
    return int(len(plan) > MOST_ROOMS or max(plan.values()) > MOST_FLOORS)


if __name__ == "__main__":
    sys.exit(main())
