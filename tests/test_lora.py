"""Adapters: they start as nothing, they alone are trained, they merge and go out."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from scaletrain import checkpoint, config, evaluate, step, train
from scaletrain.checkpoint import warm_start
from scaletrain.config import LoraConfig
from scaletrain.errors import CheckpointError
from scaletrain.hf import exporter, importer, safetensors

REFERENCE = pathlib.Path(__file__).parent / "reference"
LORA = LoraConfig(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The workdir of an imported model."""
    workdir = tmp_path_factory.mktemp("base") / "w"
    importer.import_checkpoint(str(REFERENCE / "llama3"), str(workdir), [])
    return workdir


def adapted(base, **changes):
    run = config.from_json((base / "config.json").read_text())
    run = dataclasses.replace(run, lora=LORA, init_from=str(base))
    return small.changed(
        run,
        num_steps=4,
        batch_size=8,
        seq_len=32,
        log_every_steps=1,
        optim__learning_rate=3e-2,
        optim__warmup_steps=0,
        optim__schedule="constant",
        **changes,
    )


@pytest.fixture
def unjudged(monkeypatch):
    """Runs evaluate nothing: one program fewer to compile."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: {})


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The workdir of four steps of training adapters."""
    workdir = tmp_path_factory.mktemp("trained") / "w"
    run = adapted(base, precision__compute="float32")
    train.run(run, str(workdir))
    return workdir


def settings(workdir):
    return config.from_json((workdir / "config.json").read_text())


def logits(workdir, tmp_path, run=None):
    tokens = np.load(REFERENCE / "llama3" / "reference.npz")["tokens"]
    np.save(tmp_path / "tokens.npy", tokens)
    out = str(tmp_path / "logits.npy")
    run = run or settings(workdir)
    evaluate.score(run, str(workdir), None, str(tmp_path / "tokens.npy"), out)
    return np.load(out)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_an_untrained_adapter_changes_no_bit(base, compute):
    """B = 0, whatever A is; the weights beside it are kept as they are multiplied."""
    run = adapted(base, precision__compute=compute, mesh=config.MeshConfig())
    plain = dataclasses.replace(run, lora=LoraConfig(), init_from="")
    tokens = jnp.asarray(np.load(REFERENCE / "llama3" / "reference.npz")["tokens"])
    found = []
    for each in (plain, run):
        taken = small.Taken(each)
        state = taken.state
        with jax.set_mesh(taken.mesh):
            part = state.frozen or state.params
            weights = warm_start.initial_weights(run, part)
            weights = dataclasses.replace(
                state, **{"frozen" if state.frozen else "params": weights}
            ).weights
            told = functools.partial(step.logits_step, program=taken.program)
            out, _ = jax.jit(told)(weights, tokens)
        found.append(np.asarray(out))
    np.testing.assert_array_equal(*found)


def test_only_adapters_are_trained_and_held_by_the_optimizer(base):
    """On the compiled step: what it takes, what it gives back, what it changes."""
    run = adapted(base, mesh=config.MeshConfig())
    taken = small.Taken(run)
    wanted = {f"blocks/{name}/lora_{x}" for name in LORA.adapted for x in "ab"}
    assert set(checkpoint.flat(taken.state.params)) == wanted
    held = sum(leaf.size for leaf in jax.tree.leaves(taken.state.params))
    counters = 64 + 2 * config.MAX_SPIKE_WINDOW  # and the losses and norms it has seen
    moments = sum(leaf.size for leaf in jax.tree.leaves(taken.state.opt_state))
    assert 2 * held <= moments <= 2 * held + counters
    frozen = checkpoint.flat(taken.state.frozen)
    kinds = {path.rpartition("/")[2]: leaf.dtype for path, leaf in frozen.items()}
    assert kinds == {"weight": "bfloat16", "embedding": "bfloat16", "scale": "float32"}
    memory = taken.execute.memory_analysis()
    arguments = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves((taken.state, taken.program.batch))
        if hasattr(leaf, "nbytes")
    ) + sum(leaf.size * leaf.dtype.itemsize for leaf in taken.program.batch.values())
    assert memory.argument_size_in_bytes <= arguments * 1.1
    # The frozen weights are handed through, not copied.
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in frozen.values())
    before = jax.device_get(frozen)
    adapters = jax.device_get(taken.state.params)
    assert taken.step(small.random_batch(run, 0))["grad_norm"] > 0
    after = jax.device_get(checkpoint.flat(taken.state.frozen))
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])
    moved = jax.tree.map(np.array_equal, adapters, jax.device_get(taken.state.params))
    assert not any(jax.tree.leaves(moved["blocks"]["attention"]["q"]["lora_b"]))


def test_targets_are_chosen_by_pattern(base):
    run = adapted(base, mesh=config.MeshConfig())
    run = small.changed(run, lora__targets=("attention/[qv]", "mlp/up"))
    names = {
        p.rpartition("/")[0]
        for p in checkpoint.flat(small.Taken(run).program.state.params)
    }
    assert names == {"blocks/attention/q", "blocks/attention/v", "blocks/mlp/up"}


def test_merged_equals_unmerged(base, trained, tmp_path):
    beside = logits(trained, tmp_path)
    assert np.abs(beside - logits(base, tmp_path)).max() > 0.1
    run = settings(trained)
    exporter.export_checkpoint(
        run, str(trained), str(tmp_path / "m"), None, "", merge=True
    )
    importer.import_checkpoint(str(tmp_path / "m"), str(tmp_path / "mw"), [])
    np.testing.assert_allclose(logits(tmp_path / "mw", tmp_path), beside, atol=1e-4)


def test_adapters_go_out_in_the_layout_of_peft(trained, tmp_path):
    """W + alpha / rank * B A, in the published layout, is the merged tensor."""
    run = settings(trained)
    for folder, merge in (("a", False), ("m", True)):
        exporter.export_checkpoint(
            run, str(trained), str(tmp_path / folder), None, "", merge=merge
        )
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 3, 6.0)
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.rename(tmp_path / "a" / safetensors.SINGLE)
    adapter, merged, before = (
        {name: each.read() for name, each in safetensors.contents(folder).items()}
        for folder in (tmp_path / "a", tmp_path / "m", REFERENCE / "llama3")
    )
    modules = {name.removesuffix(".lora_A.weight") for name in adapter if "_A" in name}
    assert len(modules) == 3 * 7
    assert len(adapter) == 2 * len(modules)
    for module in modules:
        a, b = (adapter[f"{module}.lora_{x}.weight"] for x in "AB")
        name = module.removeprefix("base_model.model.") + ".weight"
        wanted = before[name] + 2.0 * b @ a
        np.testing.assert_allclose(merged[name], wanted, atol=1e-6)
        assert any(module.endswith(f".{target}") for target in about["target_modules"])


def test_a_resumed_run_keeps_what_it_adapts(base, trained, tmp_path, unjudged):
    """Two steps and two more are four steps; the base's step is held."""
    workdir = tmp_path / "w"
    run = adapted(base, precision__compute="float32")
    train.run(small.changed(run, num_steps=2), str(workdir))
    assert settings(workdir).init_from == f"{base}@0"
    train.run(run, str(workdir))
    kept = {p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()}
    assert kept == {"2", "4"}
    one, two = (logits(w, tmp_path) for w in (workdir, trained))
    np.testing.assert_array_equal(one, two)
    shutil.copytree(base, tmp_path / "copy")
    other = dataclasses.replace(run, init_from=str(tmp_path / "copy"), num_steps=6)
    with pytest.raises(CheckpointError, match=r"other settings:\n  init_from: "):
        train.run(other, str(workdir))


def test_adapters_without_a_base_are_refused(base, trained, tmp_path):
    run = adapted(base)
    problems = config.problems(dataclasses.replace(run, init_from=""))
    assert any("lora.rank=3; adapters need weights" in line for line in problems)
    problems = config.problems(small.changed(run, lora__targets=("attention/w",)))
    assert any("lora.targets=attention/w; no matrix" in line for line in problems)
    problems = config.problems(small.changed(small.RUN, lora__alpha=3.0))
    assert any("lora.alpha=3.0; no effect with lora.rank=0" in p for p in problems)
    for place, words in (
        (tmp_path / "gone", "init_from=.*gone; no checkpoint there; give the workdir"),
        (f"{base}@7", "init_from=.*@7; --step=7; .* has no such checkpoint"),
        (trained, "init_from=.*; it holds adapters without the weights beside them"),
    ):
        other = dataclasses.replace(run, init_from=str(place))
        with pytest.raises(CheckpointError, match=words):
            train.run(other, str(tmp_path / "w"))
        assert not list((tmp_path / "w").iterdir())


def test_a_base_is_the_same_however_its_path_is_spelled(base, monkeypatch):
    wanted = f"{base}@0"
    monkeypatch.chdir(base.parent)
    spelled = (base.name, f"{base}/", f"../{base.parent.name}/{base.name}", wanted)
    for init_from in spelled:
        run = dataclasses.replace(adapted(base), init_from=init_from)
        assert warm_start.pinned(run).init_from == wanted


def test_a_folder_of_a_run_may_have_a_name_that_ends_like_a_step(tmp_path):
    for name in ("a@3", "b", "b@4", "c:d@e"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    for init_from, wanted in (
        ("a@3", ("a@3", None)),
        ("a@3@7", ("a@3", 7)),
        ("b@4", ("b", 4)),  # as it was pinned before the other folder was there
        ("c:d@e", ("c:d@e", None)),
        ("gone@5", ("gone", 5)),
    ):
        folder, step = wanted
        assert warm_start.parsed(f"{tmp_path}/{init_from}") == (
            f"{tmp_path}/{folder}",
            step,
        )


def test_joined_matrices_need_merging(tmp_path, unjudged):
    """Phi-3 stores q, k and v as one tensor, which an adapter file cannot split."""
    importer.import_checkpoint(str(REFERENCE / "phi3"), str(tmp_path / "base"), [])
    run = config.from_json((tmp_path / "base" / "config.json").read_text())
    run = small.changed(
        run, lora=LORA, init_from=str(tmp_path / "base"), num_steps=1, batch_size=8,
        seq_len=16, optim__warmup_steps=0,
    )  # fmt: skip
    train.run(run, str(tmp_path / "w"))
    run = settings(tmp_path / "w")
    with pytest.raises(CheckpointError, match="qkv_proj.*; use --merge"):
        exporter.export_checkpoint(
            run, str(tmp_path / "w"), str(tmp_path / "x"), None, "", merge=False
        )
    exporter.export_checkpoint(
        run, str(tmp_path / "w"), str(tmp_path / "x"), None, "", merge=True
    )
