"""The console: lines for the user at the terminal."""

import sys

import jax


def say(line: str) -> None:
    """Prints a line on standard error, in process 0 alone."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
