"""What `scaletrain` on a command line runs: flags, then settings, then a command.

Process-wide state is set here and nowhere else. A command's module is imported once
the request is known to make sense.
"""

import contextlib
import glob
import importlib.util
import json
import logging
import os
import signal
import sys
from typing import Any

from absl import logging as absl_logging

from scaletrain import cluster, failures
from scaletrain.commands import COMMANDS, line
from scaletrain.errors import ScaletrainError
from scaletrain.hardware.gpus import MEMORY_FRACTION
from scaletrain.record import finite


def main() -> None:
    """Runs the command line and exits with what became of it (see `errors`)."""
    # Orbax warns of choices that are made on purpose here, and prints the traceback
    # of what it then raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    _silence_failed_writes()
    # Of a GPU's memory; by default jax leaves a quarter of it unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    # Of the host's, for arrays on their way to a checkpoint; by default 64, which is
    # less than eight GPUs hold of a state that fills them.
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(_host_gib()))
    _silence_libtpu()
    # What ends at once keeps what it knows, and removes what is half done; a command
    # that stops in its own way sets handlers of its own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _exit_code()
    finally:
        _leave_pipes()
    cluster.leave(code)
    sys.exit(code)


def _exit_code() -> int:
    """Runs the command line; returns what the process ends with."""
    run = None
    try:
        args, run = line.read(sys.argv[1:])
        result = COMMANDS[args.command].execute(run, args)
        if cluster.lead():  # one result, however many processes
            record = finite(result.record)
            _print(json.dumps(record, indent=2) if args.json else result.text)
        if result.interrupted:
            raise KeyboardInterrupt
        return 0
    except (ScaletrainError, OSError, MemoryError, RuntimeError) as err:
        failure = failures.explained(err, run)
        if failure is None:
            raise
        words, code = str(failure), failure.exit_code
    except KeyboardInterrupt:
        words, code = "interrupted", 130
    with contextlib.suppress(BrokenPipeError):
        print(f"scaletrain: {words}", file=sys.stderr, flush=True)
    return code


def _print(words: str) -> None:
    """Prints results; a reader that has gone has what it wants of them."""
    with contextlib.suppress(BrokenPipeError):
        print(words, flush=True)


def _leave_pipes() -> None:
    """Keeps Python from telling once more of a pipe or a disk that takes nothing."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _silence_libtpu() -> None:
    """Keeps libtpu, which `plan` needs, quiet on a machine that has no chips.

    jax starts it wherever it is installed, and it then tells of what it misses. Every
    chip that jax could use shows as a device file; a machine with any is left alone.
    """
    chips = ("accel*", "vfio/*", "nvidia*", "kfd", "dri/*", "dxg")
    if (
        importlib.util.find_spec("libtpu")
        and "JAX_FORCE_TPU_INIT" not in os.environ
        and not any(glob.glob(f"/dev/{name}") for name in chips)
    ):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _host_gib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30


def _silence_failed_writes() -> None:
    """Silences Orbax's traceback for each write that a failed save leaves behind.

    Orbax waits for none of them after the first that fails; the save itself reports
    the error.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


if __name__ == "__main__":
    main()
