"""Every experiment: its settings, its size, and that its step lowers for its TPUs."""

import pathlib

import jax
import pytest

from scaletrain import compilation, config, flops, mesh
from scaletrain.program import build

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
# One of the names in families.py; tests/test_families_presets.py has them all.
EXPERIMENTS = [
    str(p) + ":gemma3-1b" * (p.stem == "families") for p in sorted(FOLDER.glob("*.py"))
]
EXPERIMENTS.append(str(FOLDER / "llama_1b.py:synthetic"))
# Published parameter counts (Llama 3: arXiv 2407.21783, table 3), of all parameters.
PARAMETERS = {"llama3_8b": 8.03e9, "llama3_70b": 70.55e9, "gpt2_124m": 124e6}


@pytest.mark.parametrize("spec", EXPERIMENTS)
def test_lowers_for_tpu(spec):
    """Shapes, shardings and every operation are accepted for the real mesh."""
    run = config.load(spec)
    run = config.resolve(run, run.mesh.num_devices or 4)
    grid = mesh.abstract(run.mesh)
    with jax.sharding.use_abstract_mesh(grid):
        program = build(run, grid)
        traced = compilation.jitted(program).trace(program.state, program.batch)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert f"num_partitions = {grid.size}" in text
    count = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    name = pathlib.Path(spec.partition(":")[0]).stem
    if name in PARAMETERS:
        assert count == pytest.approx(PARAMETERS[name], rel=0.005)
    assert flops.matmul_weights(run.model) <= count


@pytest.mark.parametrize("spec", EXPERIMENTS)
def test_settings_are_golden(spec, golden):
    name = pathlib.Path(spec).name.replace(".py", "").replace(":", "_")
    golden(f"{name}.json", config.to_json(config.load(spec)))


@pytest.mark.parametrize("spec", EXPERIMENTS)
def test_header_says_command_hardware_and_whether_it_ran(spec):
    text = pathlib.Path(spec.partition(":")[0]).read_text()
    header = text.split('"""')[1]
    assert all(word in header for word in ("Command", "Hardware:", "Run:"))
    assert "from scaletrain.config import" in text
    assert text.count("import") == 1
