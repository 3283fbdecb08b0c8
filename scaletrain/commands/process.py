"""The state of a process that trains: the other processes, and kept executables."""

import argparse

from scaletrain import cluster, config
from scaletrain.config import RunConfig
from scaletrain.workdir import Workdir

_COMPILED_BYTES = 2**31  # in a workdir; beyond it those used least recently go


def join(run: RunConfig, args: argparse.Namespace) -> None:
    """Joins the other processes of the run, if there are any, that want the same.

    Raises:
      ScaletrainError: one is missing, or has other code or settings.
    """
    cluster.join(args)
    settings = {f"config.{path}": value for path, _, value in config.leaves(run)}
    cluster.agree({"code": cluster.code_version(), **settings})


def keep_compiled(workdir: str) -> None:
    """Keeps executables in the workdir, so that the next start need not compile.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    none. An executable is known by its program, compiler, options and devices, with a
    CPU's features; one that cannot be read is compiled again with a warning.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        folder = Workdir.of(workdir).compiled
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)
