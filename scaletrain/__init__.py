"""scaletrain: TPU-first training of large language models on JAX and XLA."""

__version__ = "0.1.0"
