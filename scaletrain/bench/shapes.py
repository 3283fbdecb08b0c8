"""The matmuls and the attention of a run, in the shapes on one device."""

import dataclasses

from scaletrain import flops, matrices
from scaletrain.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A matmul of the model on one device: [rows, inputs] x [inputs, outputs]."""

    rows: int  # tokens of a micro-batch
    inputs: int
    outputs: int
    count: int  # of such matmuls in a step, over layers and micro-batches
    trained: bool  # whether its weights have gradients

    @property
    def flops(self) -> int:
        """FLOPs of one pass; forward, dgrad and wgrad have the same number."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes that a step computes; frozen weights need no wgrad."""
        return ("forward", "dgrad", "wgrad") if self.trained else ("forward", "dgrad")


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention of local or of global layers, on one device."""

    rows: int  # sequences of a micro-batch
    queries: int  # tokens of a sequence on the device, see mesh.context
    keys: int  # tokens of a whole sequence
    heads: int
    kv_heads: int
    d_head: int
    local: bool  # whether it is limited to the sliding window
    keys_seen: float  # keys that a query attends to, on average
    count: int  # of such attentions in a step, over layers and micro-batches

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass; the backward pass takes twice as many."""
        return 4 * self.rows * self.queries * self.heads * self.d_head * self.keys_seen


def gemms(run: RunConfig) -> dict[str, Gemm]:
    """Returns the matmuls of a resolved run by name, without those of adapters."""
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
    """Returns the attention of local and of global layers, if the model has them."""
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
