"""How far a search is, on standard error."""

import sys
import time

_WIDTH = 24


class Progress:
    """A bar that is redrawn on a terminal, and a line at the end elsewhere."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._began = time.monotonic()
        self._drawn = sys.stderr.isatty()
        self._draw()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._draw()

    def tell(self, words: str) -> None:
        """Prints a line beside the bar."""
        clear = "\r\033[K" if self._drawn else ""
        print(f"{clear}plan: {words}", file=sys.stderr)

    def end(self) -> None:
        """Leaves the last state behind."""
        print(self._line() if not self._drawn else "", file=sys.stderr)

    def _draw(self) -> None:
        if self._drawn:
            print(f"\r\033[K{self._line()}", end="", file=sys.stderr, flush=True)

    def _line(self) -> str:
        filled = _WIDTH * self._done // max(1, self._total)
        seconds = time.monotonic() - self._began
        bar = "#" * filled + "." * (_WIDTH - filled)
        return f"[{bar}] {self._done}/{self._total} {self._what}, {seconds:.0f} s"
