"""Reading of launchers' variables: numbers, ports and the GPUs of a host."""

import zlib
from collections.abc import Iterable, Mapping

from scaletrain.errors import ConfigError

Environ = Mapping[str, str]

FIXED_PORT = 8482  # on hosts that serve one run at a time
_JOB_PORTS = range(61440, 65536)  # Linux gives outgoing connections those below


def numbers(source: str, env: Environ, names: Iterable[str]) -> list[int]:
    """Returns the values of variables that a launcher must have set together.

    Args:
      source: the launcher, as messages name it.
      env: the environment, or values read from elsewhere.
      names: of the variables, in the order of the values.

    Raises:
      ConfigError: one of them is not a number.
    """
    names = list(names)
    for name in names:
        if not env.get(name, "").isdigit():
            raise unexpected(source, name, env.get(name, ""))
    return [int(env[name]) for name in names]


def unexpected(source: str, name: str, value: str) -> ConfigError:
    """Returns the error for a variable that its launcher does not set like this.

    Args:
      source: the launcher, as messages name it.
      name: of the variable.
      value: that it has.
    """
    return ConfigError(
        [
            f"{source}: {name}={value}; not what {source} sets it to; start every "
            "process with it, or give --coordinator, --num_processes, --process_id."
        ]
    )


def job_port(job: str) -> int:
    """Returns a port that all processes of a job compute alike.

    Two jobs that share a host seldom get the same one.
    """
    return _JOB_PORTS[zlib.crc32(job.encode()) % len(_JOB_PORTS)]


def local_gpus(env: Environ, local_id: int, num_local: int) -> tuple[int, ...] | None:
    """Returns the indices of this process's GPUs among the visible ones, None for all.

    Args:
      env: the environment; without CUDA_VISIBLE_DEVICES each process gets one GPU.
      local_id: of this process among those of its host, from 0.
      num_local: the number of processes on this host.

    Raises:
      ConfigError: the visible GPUs cannot be divided evenly.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else num_local
    if num_local == 1 or count == 1:  # alone, or the launcher gave each its own
        return None
    if count % num_local:
        raise ConfigError(
            [
                f"CUDA_VISIBLE_DEVICES={visible}; {num_local} processes of this host "
                f"cannot share {count} GPUs evenly; start a number that divides it."
            ]
        )
    each = count // num_local
    return tuple(range(local_id * each, (local_id + 1) * each))
