"""Lines for the person at the terminal."""

import sys

import jax


def say(line: str) -> None:
    """Prints a line on standard error, once however many processes there are."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
