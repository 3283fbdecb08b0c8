"""Process-wide settings of the tests; set before any backend starts."""

import gc
import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# JAX_PLATFORMS=cuda runs the kernels for GPUs, in test_attention.py and
# test_kernels.py.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile for longer than they run: a third of the time without LLVM's passes.
jax.config.update("jax_disable_most_optimizations", True)
# Many compile the same program: kept for the other worker and the next run.
compiled = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(compiled))
jax.config.update("jax_compilation_cache_max_size", 2**30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# A trace is many small objects, few of them garbage: a twentieth of the time.
gc.set_threshold(50_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in golden/"
    )


@pytest.fixture
def golden(request):
    """Returns a check that a text equals a committed file to the letter."""

    def check(name, text):
        path = pathlib.Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), (
            f"{name} differs. If nothing was meant to change, this is a bug; if so, "
            "run pytest --update-golden and review the difference."
        )

    return check
