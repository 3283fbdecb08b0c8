"""The matmuls and the attention of a run, in the shapes that one device meets."""

import dataclasses

from scaletrain import flops, matrices
from scaletrain.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A matmul of the model as one device meets it: [rows, inputs] x [inputs, outputs].

    Rows are tokens of one part of the batch; `count` is how often a step does it.
    """

    rows: int
    inputs: int
    outputs: int
    count: int
    trained: bool  # whether its weights have gradients

    @property
    def flops(self) -> int:
        """Of one pass: forward, dgrad and wgrad each take as many."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def passes(self) -> tuple[str, ...]:
        """What a step computes with it."""
        return ("forward", "dgrad", "wgrad") if self.trained else ("forward", "dgrad")


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention of a kind of layer as one device meets it."""

    rows: int  # sequences
    queries: int  # tokens of a sequence that lie on the device
    keys: int
    heads: int
    kv_heads: int
    d_head: int
    local: bool  # whether it looks through the sliding window
    keys_seen: float  # by a query, on average
    count: int

    @property
    def flops(self) -> float:
        """Of the forward pass; backward takes twice as many."""
        return 4 * self.rows * self.queries * self.heads * self.d_head * self.keys_seen


def gemms(run: RunConfig) -> dict[str, Gemm]:
    """Returns the matmuls of a resolved run, adapters left out, by their names."""
    model, tensor = run.model, run.mesh.size("tensor")
    trained = run.lora.rank == 0
    rows = run.shard_rows * run.seq_len // run.mesh.size("context")
    count = model.num_layers * run.accumulate_steps
    shapes = {
        matrix.name.split("/")[1]: Gemm(
            rows, *matrix.shape(model, tensor), count, trained
        )
        for matrix in matrices.of_layer(model)
    }
    head = matrices.HEAD.shape(model, tensor)
    shapes["head"] = Gemm(rows, *head, run.accumulate_steps, trained)
    return shapes


def attentions(run: RunConfig) -> dict[str, Attention]:
    """Returns the attention of local and of global layers, as far as there are any."""
    model, tensor = run.model, run.mesh.size("tensor")
    kinds: dict[bool, list[int]] = {}
    for layer in range(model.num_layers):
        kinds.setdefault(model.is_local(layer), []).append(layer)
    return {
        "local" if local else "global": Attention(
            rows=run.shard_rows,
            queries=run.seq_len // run.mesh.size("context"),
            keys=run.seq_len,
            heads=model.num_heads // tensor,
            kv_heads=model.num_kv_heads // tensor,
            d_head=model.d_head,
            local=local,
            keys_seen=flops.keys_seen(model, layers[0], run.seq_len)[0],
            count=len(layers) * run.accumulate_steps,
        )
        for local, layers in kinds.items()
    }
