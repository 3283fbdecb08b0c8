"""Errors of the system and of libraries, as errors that a user can act on."""

import errno

from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError, MachineError, ScaletrainError, does_not_fit

# Errors of a path, which the user can correct.
_PATHS = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
# Errors of a disk, which may pass.
_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


def explained(err: Exception, run: RunConfig | None) -> ScaletrainError | None:
    """Returns the error to show instead of a traceback, None for a programmer error.

    Args:
      err: the exception.
      run: the settings of the failed run; None if they are not known yet.
    """
    if isinstance(err, ScaletrainError):
        return err
    if isinstance(err, OSError):
        return _of_system(err)
    if isinstance(err, MemoryError) or does_not_fit(str(err)):
        return _of_memory(err, run)
    if "Unable to initialize backend" in str(err):
        return MachineError(f"JAX_PLATFORMS; {_first_line(err)}")
    return None


def _of_system(err: OSError) -> ScaletrainError | None:
    """Returns the error for a path, a disk or a closed pipe."""
    reason = (err.strerror or "").lower()
    if err.errno in _PATHS and err.filename is not None:
        return ConfigError(
            [f"{_name(err.filename)}; {reason}; give a path that can be used."]
        )
    if err.errno in _DISKS:
        place = "standard output or a file"
        if err.filename is not None:
            place = _name(err.filename)
        return MachineError(
            f"{place}; {reason}; make room, or use another disk, and try again."
        )
    if isinstance(err, BrokenPipeError):
        return MachineError("standard error; nobody reads it any more; write to a file")
    return None


def _of_memory(err: Exception, run: RunConfig | None) -> MachineError:
    """Returns the error for too little memory, with the sizes that need it."""
    sizes = ""
    if run is not None:
        sizes = (
            f"batch_size={run.batch_size}, seq_len={run.seq_len}, "
            f"model.num_layers={run.model.num_layers}, model.d_model="
            f"{run.model.d_model}; "
        )
    return MachineError(
        f"{sizes}the memory is too small ({_first_line(err)}); lower batch_size or "
        "seq_len, raise accumulate_steps, set model.remat=full, split the parameters "
        "over more devices with mesh.fsdp, or take a smaller model; `scaletrain plan` "
        "says what a slice can hold."
    )


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def _name(path: str | bytes | int) -> str:
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)
