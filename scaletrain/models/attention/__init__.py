"""Causal attention over packed sequences: one contract, several implementations.

Token t may look at token s when s comes no later, both belong to the same document
(equal segment ids) and s lies inside the sliding window. Every implementation obeys
this and is compared with `xla`, the plain reference. `config.attention` says which
settings each can run; a new one is a file with `attend`, a row there and a row here.

    xla       plain operations, everywhere
    splash    the TPU's kernel
    cudnn     the GPU's library
      scores  settings of scores; kernels run on the heads of each device
      mask    the mask of documents, causality and window
"""

import functools

from jaxtyping import Array, Bool, Float, Int

from scaletrain.models.attention import cudnn, splash, xla
from scaletrain.models.attention.scores import Scores

IMPLEMENTATIONS = {
    "auto": xla.attend,  # where no mesh has decided, see program.build
    "xla": xla.attend,
    "cudnn": cudnn.attend,
    "splash": splash.attend,
    "splash_interpreted": functools.partial(splash.attend, interpret=True),
}


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    scores: Scores,
    q_start: int | Int[Array, ""] = 0,
    local: bool | Bool[Array, ""] = True,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores) v over the slots each query may look at.

    N query heads share K key/value heads in groups of N / K (arXiv 2305.13245). The
    residuals of the backward pass are named "attention" for model.remat_save.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      q_segments_BT: document of each query.
      kv_segments_BS: document of each slot.
      scores: the settings of scores.
      q_start: slot of the first query among the S slots.
      local: whether this layer looks through `scores.window`.
      implementation: a key of `IMPLEMENTATIONS`.
    """
    return IMPLEMENTATIONS[implementation](
        q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_start, local, scores
    )
