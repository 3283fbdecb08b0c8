"""Every way to take a step, on four devices, reaches the losses of the plain one."""

import numpy as np
import pytest
import small

from scaletrain import losses, sharding
from scaletrain.config import MeshConfig
from scaletrain.kernels import norm, rotary
from scaletrain.kernels.cross_entropy import cross_entropy
from scaletrain.kernels.norm import add_norm
from scaletrain.kernels.rotary import split_rotated
from scaletrain.models import attention
from scaletrain.models.attention import splash

RUN = small.changed(small.RUN, seq_len=128, batch_size=8)  # 128: what splash takes
EXACT, ROUNDED = 2e-6, 1e-2  # of a loss; fewer bits are coarser
VARIANTS = {
    "splash": ({"model__attention": "xla"}, EXACT),
    "kernels of a GPU": ({}, EXACT),
    "unrolled": ({"model__layers": "unroll"}, EXACT),
    "remat full": ({"model__remat": "full"}, EXACT),
    "remat dots": ({"model__remat": "dots"}, EXACT),
    "remat save": (
        {"model__remat": "save", "model__remat_save": ("query", "attention")},
        EXACT,
    ),
    "small chunks of a cut vocabulary": ({"mesh": MeshConfig(fsdp=2, tensor=2)}, EXACT),
    "fp8": ({"precision__matmul": "fp8"}, ROUNDED),
    "fp8 delayed": (
        {"precision__matmul": "fp8", "precision__scaling": "delayed"},
        ROUNDED,
    ),
    "fp8 remat": (
        {"precision__matmul": "fp8", "model__remat": "full", "accumulate_steps": 2},
        ROUNDED,
    ),
    "int8": ({"precision__matmul": "int8"}, ROUNDED),
    "bfloat16 sums": ({"precision__reduce": "bfloat16"}, 3e-2),
    "bfloat16 gradients": (
        {
            "precision__gradients": "bfloat16",
            "accumulate_steps": 2,
            "mesh": MeshConfig(data=2, fsdp=2),
        },
        ROUNDED,
    ),
}


def learned(run):
    """Returns the losses of a batch of text that is taken again and again."""
    taken = small.Taken(run)
    batch = small.text_batch(run)
    return [taken.step(batch)["loss"] for _ in range(12)]


@pytest.fixture(scope="module")
def alone():
    """Returns the losses of one device whose whole logits exist at once."""
    patch = pytest.MonkeyPatch()
    patch.setattr(losses, "LOGITS", 2**40)
    found = learned(RUN)
    patch.undo()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_reaches_the_losses_of_the_plain_step(name, alone, monkeypatch):
    settings, tolerance = VARIANTS[name]
    used = set()

    def interpreted(kernel):
        def call(*given, **settings):
            used.add(kernel)
            return kernel(*given, **settings, interpret=True)

        return call

    kernels = {
        "splash": {splash.attend},
        "kernels of a GPU": {add_norm, cross_entropy, split_rotated},
    }.get(name, set())
    if name == "splash":
        kernel = interpreted(splash.attend)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, "xla", kernel)
    elif kernels:
        monkeypatch.setattr(norm, "add_norm", interpreted(add_norm))
        monkeypatch.setattr(rotary, "split_rotated", interpreted(split_rotated))
        monkeypatch.setattr(losses, "cross_entropy", interpreted(cross_entropy))
        monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    if "chunks" in name:
        monkeypatch.setattr(losses, "LOGITS", 100 * RUN.model.vocab_size)
    run = small.changed(RUN, **({"mesh": MeshConfig(fsdp=4)} | settings))
    found = learned(run)
    np.testing.assert_allclose(found, alone, rtol=tolerance)
    assert used == kernels
    if tolerance == ROUNDED:  # a variant that is not taken is exact
        assert np.abs(np.array(found) / alone - 1).max() > EXACT


def test_parameters_of_16_bits_learn():
    """They begin elsewhere: the same key gives other numbers in another format."""
    low = dict.fromkeys(("precision__params", "precision__gradients"), "bfloat16")
    losses = learned(small.changed(RUN, mesh=MeshConfig(fsdp=4), **low))
    assert losses[-1] < 0.7 * losses[0]
