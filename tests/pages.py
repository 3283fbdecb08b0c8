"""Writes the generated pages of docs/reference/: `make reference`."""

import pathlib

from scaletrain.config import explain

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "reference"
PAGES = {"settings.md": explain.page}


def main() -> None:
    """Writes every page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
