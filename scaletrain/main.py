"""The entry point of `scaletrain`: flags, then settings, then a command.

Process-wide state is set in this module alone. A command's module is imported only
after its flags and settings are checked, so that errors appear at once.
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
    """Runs the command line and exits with its exit code, see `errors`."""
    # Orbax warns of choices that scaletrain makes on purpose, and prints the tracebacks
    # of errors that it then raises, too.
    absl_logging.set_verbosity(absl_logging.FATAL)
    _silence_failed_writes()
    # The usable fraction of a GPU's memory; by default jax leaves a quarter unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    # Host memory for the copies of arrays that a checkpoint saves. The default, 64 GiB,
    # is less than the state of eight full GPUs.
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(_host_gib()))
    _silence_libtpu()
    # SIGTERM raises KeyboardInterrupt, so that `finally` blocks remove partial files.
    # `train` replaces this handler: it saves a checkpoint first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _exit_code()
    finally:
        _leave_pipes()
    cluster.leave(code)
    sys.exit(code)


def _exit_code() -> int:
    """Returns the exit code of the command line, after running it."""
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
        message, code = str(failure), failure.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    with contextlib.suppress(BrokenPipeError):
        print(f"scaletrain: {message}", file=sys.stderr, flush=True)
    return code


def _print(text: str) -> None:
    """Prints a result; a reader that closes the pipe early (`head`) is no error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def _leave_pipes() -> None:
    """Flushes the output; keeps Python from reporting a closed pipe again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _silence_libtpu() -> None:
    """Silences the warnings of libtpu on a machine without chips; `plan` needs libtpu.

    jax initialises it wherever it is installed, and it then prints warnings. Every chip
    that jax can use has a device file; on a machine with any, nothing is changed.
    """
    device_files = ("accel*", "vfio/*", "nvidia*", "kfd", "dri/*", "dxg")
    if (
        importlib.util.find_spec("libtpu")
        and "JAX_FORCE_TPU_INIT" not in os.environ
        and not any(glob.glob(f"/dev/{name}") for name in device_files)
    ):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _host_gib() -> int:
    """Returns the memory of this host in GiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30


def _silence_failed_writes() -> None:
    """Silences the tracebacks of writes that a failed save leaves behind.

    After the first failed write, Orbax does not wait for the others, and each prints
    a traceback when it ends. The save itself reports the error.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


if __name__ == "__main__":
    main()
