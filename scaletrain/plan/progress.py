"""The progress of a search, on standard error."""

import sys
import time

_WIDTH = 24


class Progress:
    """A progress bar on a terminal; in a log file, one line at the end."""

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done = title, total, 0
        self._began = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._draw()

    def advance(self) -> None:
        """Counts one more item as done."""
        self._done += 1
        self._draw()

    def log(self, words: str) -> None:
        """Prints a line above the bar."""
        clear = "\r\033[K" if self._is_terminal else ""
        print(f"{clear}plan: {words}", file=sys.stderr)

    def end(self) -> None:
        """Ends the line of the bar, or prints its last state into a log file."""
        print(self._line() if not self._is_terminal else "", file=sys.stderr)

    def _draw(self) -> None:
        if self._is_terminal:
            print(f"\r\033[K{self._line()}", end="", file=sys.stderr, flush=True)

    def _line(self) -> str:
        filled = _WIDTH * self._done // max(1, self._total)
        seconds = time.monotonic() - self._began
        bar = "#" * filled + "." * (_WIDTH - filled)
        return f"[{bar}] {self._done}/{self._total} {self._title}, {seconds:.0f} s"
