"""The connection to the other processes of a run, and its compilation cache."""

import argparse

from scaletrain import cluster, config
from scaletrain.config import RunConfig
from scaletrain.workdir import Workdir

_COMPILED_BYTES = 2**31  # of a workdir's cache; beyond it jax evicts by last use


def join(run: RunConfig, args: argparse.Namespace) -> None:
    """Joins the other processes of the run, if there are any, and compares with them.

    Raises:
      ScaletrainError: one is missing, or has other code or settings.
    """
    cluster.join(args)
    settings = {f"config.{path}": value for path, _, value in config.leaves(run)}
    cluster.agree({"code": cluster.code_version(), **settings})


def keep_compiled(workdir: str) -> None:
    """Sets jax's compilation cache to a folder of the workdir.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    none. The key of an executable is its program, compiler, options and devices, with a
    CPU's features; one that cannot be read is compiled again, with a warning.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        folder = Workdir.of(workdir).compiled
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)
