"""Architecture alone: settings and tensors in, tensors out."""

from scaletrain.models.transformer import Cache, Decoder

__all__ = ["Cache", "Decoder"]
