"""A mirror of the code's shape: folders, circles, lengths, functions used once, comments, devices.

::

    python tools/house.py                     # this checkout
    python tools/house.py v0.1.0 main         # git revisions, side by side
    python tools/house.py --repo DIR --json   # another checkout, every detail
    python tools/house.py --once              # functions used once, by file

It is read from the syntax trees of the package and the programs; nothing is imported. The numbers are for a reader to
think about, and no test sets limits to them.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "generative_recommenders"
PROGRAMS = ("main.py", "preprocess_public_data.py")
LONG_FILE = 400
PRAGMAS = ("# noqa", "# type:", "# fmt:", "# pragma", "#!")
"""Comments that speak to tools."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(root: Path) -> dict[str, Any]:
    """All numbers of the checkout at ``root``, ready for JSON."""
    files = [
        *sorted((root / PACKAGE).rglob("*.py")),
        *(root / name for name in PROGRAMS if (root / name).exists()),
    ]
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    total = sum(lines.values())
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    lengths = sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions)
    once = used_once(trees)
    outside = {name: tree for name, tree in trees.items() if not name.startswith(f"{PACKAGE}/ops/")}
    tests = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (root / "tests").rglob("*.py"))
    devices = {name: count for name, tree in outside.items() if (count := device_looks(tree))}
    autograd = {name: names for name, tree in outside.items() if (names := autograd_functions(tree))}
    return {
        "modules": len(texts),
        "modules a folder": dict(Counter(str(Path(name).parent) for name in texts).most_common()),
        "import circles": circles(import_graph(trees)),
        "lines of package and programs": total,
        "lines of tests": tests,
        "functions": len(lengths),
        "function median": statistics.median(lengths),
        "function p90": lengths[int(0.9 * len(lengths))],
        "function max": lengths[-1],
        "functions above 60 lines": sum(length > 60 for length in lengths),
        "private functions": sum(is_private(node.name) for node in functions),
        "private functions used once": [name for name in once if is_private(name.rpartition(":")[2])],
        "public functions used once": [name for name in once if not is_private(name.rpartition(":")[2])],
        "comment share": round(sum(map(comment_lines, texts.values())) / total, 4),
        "docstring share": round(sum(map(docstring_lines, trees.values())) / total, 4),
        "device.type outside ops": devices,
        "autograd functions outside ops": autograd,
        f"files above {LONG_FILE} lines": {name: count for name, count in lines.items() if count > LONG_FILE},
    }


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used_once(trees: dict[str, ast.Module]) -> list[str]:
    """``file:name`` of functions whose name is read at one place of the package and the programs. Names are compared as
    text, so that two functions of one name count each other's uses; an import or an export is no use."""
    uses: Counter[str] = Counter()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Name):
            uses[node.id] += 1
        elif isinstance(node, ast.Attribute):
            uses[node.attr] += 1
    return [
        f"{file}:{node.name}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Function) and not node.name.startswith("__") and uses[node.name] == 1
    ]


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of the checkout that it imports, inside functions too, but not for the type checker alone."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in trees}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        names = imported_names(trees[file], package)
        known = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (known & modules.keys()) - {module}
    return graph


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported_names(node, package)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, by transitive closure."""
    reached = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for targets in reached.values():
            if middle in targets:
                targets.update(reached[middle])
    groups = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }
    return sorted(sorted(group) for group in groups)


def comment_lines(text: str) -> int:
    """Lines with a comment for people."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and not t.string.startswith(PRAGMAS) for t in tokens)


def docstring_lines(tree: ast.Module) -> int:
    """Lines of strings that stand alone: docstrings, also those below constants."""
    nodes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    strings = (node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in strings)


def device_looks(tree: ast.Module) -> int:
    """How often the kind of a device is read: ``x.device.type``, ``device.type`` and ``x.is_cuda``."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    kinds = [node for node in attributes if node.attr == "type" and ast.unparse(node.value).endswith("device")]
    return len(kinds) + sum(node.attr in ("is_cuda", "is_cpu") for node in attributes)


def autograd_functions(tree: ast.Module) -> list[str]:
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if any("autograd.Function" in ast.unparse(base) for base in node.bases)]


def measure_revision(repo: Path, revision: str) -> dict[str, Any]:
    archive = subprocess.run(["git", "-C", str(repo), "archive", revision], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return measure(Path(folder))


def short(name: str, value: Any) -> str:
    """One cell of the table."""
    if name == "modules a folder":
        return f"at most {max(value.values())}"
    if name == "device.type outside ops":
        return f"{sum(value.values())} in {len(value)} files"
    if name.endswith("share"):
        return f"{value:.1%}"
    if name.startswith("autograd"):
        return str(sum(map(len, value.values())))
    return str(len(value)) if isinstance(value, (dict, list)) else f"{value:,}"


def once_by_file(*measured: dict[str, Any]) -> list[str]:
    """A line a file: its functions used once, private ones first; files with most of them first."""
    names: dict[str, list[str]] = {}
    for each in measured:
        for kind in ("private", "public"):
            for name in each[f"{kind} functions used once"]:
                file, _, function = name.rpartition(":")
                names.setdefault(file, []).append(function)
    return [f"{file}: {' '.join(own)}" for file, own in sorted(names.items(), key=lambda each: -len(each[1]))]


def table(columns: dict[str, dict[str, Any]]) -> str:
    first = next(iter(columns.values()))
    rows = [
        ["", *columns],
        *([name, *(short(name, each[name]) for each in columns.values())] for name in first),
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", help="git revisions of the repository; none: the checkout itself")
    parser.add_argument("--repo", type=Path, default=ROOT, help="the checkout, or the repository of the revisions")
    parser.add_argument("--json", action="store_true", help="every number and name")
    parser.add_argument("--once", action="store_true", help="names of the functions used once, by file")
    arguments = parser.parse_args()
    columns = {revision: measure_revision(arguments.repo, revision) for revision in arguments.revisions}
    columns = columns or {"checkout": measure(arguments.repo)}
    if arguments.once:
        print("\n".join(once_by_file(*columns.values())))
    else:
        print(json.dumps(columns, indent=1) if arguments.json else table(columns))


if __name__ == "__main__":
    main()
