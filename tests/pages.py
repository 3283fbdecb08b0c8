"""Writes the generated pages of docs/reference/: `make reference`."""

import ast
import pathlib
import tomllib

from scaletrain.config import explain

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reference"
_LAYERS = """\
# Layers

Each module imports only from the rows below its own; modules of one row do not import
each other. Made by `make reference` from the contract in `pyproject.toml`, which
`make check` holds, and from the first line of each module.

"""


def layers() -> str:
    """Returns the page of the layers, from the top down."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    rows = next(each["layers"] for each in contracts if each["type"] == "layers")
    lines = []
    for number, row in enumerate(rows, 1):
        for name in row.split(" | "):
            lines.append(
                f"| {number} | `{name.partition('.')[2]}` | {_promise(name)} |"
            )
    return _LAYERS + "\n".join(["| layer | module | |", "|---|---|---|", *lines]) + "\n"


def _promise(name: str) -> str:
    """Returns the first line of a module's docstring."""
    path = ROOT.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


PAGES = {"settings.md": explain.page, "layers.md": layers}


def main() -> None:
    """Writes every page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
