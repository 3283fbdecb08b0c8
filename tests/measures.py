"""Measures of a Python package's shape, for docs/internals/measures.md and the budgets.

    python tests/measures.py FOLDER [FOLDER ...]

prints one table with a column a folder: the same ruler for any code base. Files of
tests inside the folders count too.
"""

import ast
import dataclasses
import io
import pathlib
import re
import statistics
import sys
import tokenize

Function = ast.FunctionDef | ast.AsyncFunctionDef
_SUPPRESSIONS = re.compile(r"#\s*(noqa|pyright:|type: ignore|fmt: (skip|off)|pylint:)")


@dataclasses.dataclass(frozen=True)
class File:
    """One file with its syntax tree."""

    path: pathlib.Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Lines of the file."""
        return self.text.count("\n")

    @property
    def functions(self) -> list[Function]:
        """Every function and method, nested ones too."""
        return [n for n in ast.walk(self.tree) if isinstance(n, Function)]

    @property
    def classes(self) -> list[ast.ClassDef]:
        """Every class."""
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef)]


def files_in(folder: pathlib.Path) -> list[File]:
    """Returns the files of a package that Python can read, in order."""
    files = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            files.append(File(path, text, ast.parse(text)))
        except SyntaxError:
            print(f"{path}: left out, not Python 3", file=sys.stderr)
    return files


def length(function: Function) -> int:
    """Returns the lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    doc = ast.get_docstring(function, clean=False)
    return lines - (doc.count("\n") + 1 if doc else 0)


def methods(class_: ast.ClassDef) -> int:
    """Returns the number of functions in a class, properties among them."""
    return sum(isinstance(node, Function) for node in class_.body)


def imports(files: list[File], folder: pathlib.Path) -> dict[str, set[str]]:
    """Returns the modules of the package that each imports when it is loaded.

    Imports inside functions are left out: they cannot make a cycle at load time.
    """
    root = folder.name
    names = {}
    for file in files:
        parts = (root, *file.path.relative_to(folder).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    arrows: dict[str, set[str]] = {name: set() for name in names}
    for name, file in names.items():
        package = name if file.path.name == "__init__.py" else name.rpartition(".")[0]
        for target in _targets(file.tree, package):
            # `from package import name` may mean a module or what __init__ has.
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and target != name and not name.startswith(target + "."):
                arrows[name].add(target)
    return arrows


def _targets(tree: ast.Module, package: str) -> list[str]:
    targets = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(above) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            targets += [f"{module}.{alias.name}" for alias in node.names]
    return targets


def cycles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Returns the sets of modules that import each other, directly or not."""
    reach = {name: set(targets) for name, targets in arrows.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach[target] for target in targets)) - targets
            if more:
                targets |= more
                changed = True
    circles: list[set[str]] = []
    for name, targets in reach.items():
        if name in targets and not any(name in circle for circle in circles):
            circles.append({other for other in targets if name in reach[other]})
    return circles


def _is_public(function: Function) -> bool:
    return not function.name.startswith("_")


def table(folder: pathlib.Path) -> dict[str, str]:
    """Returns the measures of a package by name."""
    files = files_in(folder)
    functions = [f for file in files for f in file.functions]
    lengths = sorted(map(length, functions)) or [0]
    sizes = sorted(file.lines for file in files) or [0]
    public = [
        node
        for file in files
        for node in file.tree.body
        if isinstance(node, Function) and _is_public(node)
    ]
    documented = [f for f in public if ast.get_docstring(f)]
    docs = [
        ast.get_docstring(node, clean=False)
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Module | ast.ClassDef | Function)
    ]
    doc_lines = sum(doc.count("\n") + 1 for doc in docs if doc)
    comments = sum(_comment_lines(file.text) for file in files)
    blank = sum(not line.strip() for f in files for line in f.text.splitlines())
    code = max(1, sum(sizes) - doc_lines - comments - blank)
    local = sum(
        isinstance(inner, ast.Import | ast.ImportFrom)
        for function in functions
        for inner in ast.walk(function)
    )
    suppressed = sum(len(_SUPPRESSIONS.findall(file.text)) for file in files)
    largest = max(files, key=lambda file: file.lines)
    return {
        "files / lines": f"{len(files)} / {sum(sizes):,}",
        "function median / p90 / max": " / ".join(
            map(str, (int(statistics.median(lengths)), _p90(lengths), lengths[-1]))
        ),
        "functions > 60 lines": str(sum(n > 60 for n in lengths)),
        "largest file": f"{largest.lines} ({largest.path.relative_to(folder)})",
        "file median / p90": f"{int(statistics.median(sizes))} / {_p90(sizes)}",
        "classes > 12 methods": str(
            sum(methods(c) > 12 for file in files for c in file.classes)
        ),
        "comment lines / code": f"{comments / code:.0%}",
        "docstring lines / code": f"{doc_lines / code:.0%}",
        "public functions with docstring": f"{len(documented)}/{len(public)}",
        "docstrings with Raises": str(sum("Raises:" in (d or "") for d in docs)),
        "imports inside functions": str(local),
        "suppressions per 1,000 lines": f"{1000 * suppressed / max(1, sum(sizes)):.1f}",
        "import cycles": str(len(cycles(imports(files, folder)))),
    }


def _p90(values: list[int]) -> int:
    return values[min(len(values) - 1, int(0.9 * len(values)))]


def _comment_lines(text: str) -> int:
    """Returns the lines that hold a comment, alone or behind code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    try:
        return sum(token.type == tokenize.COMMENT for token in tokens)
    except (tokenize.TokenError, IndentationError):
        return 0


def main() -> None:
    """Prints a Markdown table with a column for each folder."""
    folders = [pathlib.Path(name) for name in sys.argv[1:]]
    columns = [table(folder) for folder in folders]
    print("| | " + " | ".join(folder.name for folder in folders) + " |")
    print("|---" * (len(folders) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
