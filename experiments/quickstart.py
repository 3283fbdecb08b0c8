"""A small decoder that learns Python from the standard library's own files.

Command:
    make quickstart
Hardware: two CPU cores, three minutes at most.
Run: see README, "Measured".
"""

from scaletrain.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    to_config_dict,
)


def get_config():
    """Returns the settings; float32, since most CPUs multiply bfloat16 slowly."""
    return to_config_dict(
        RunConfig(
            num_steps=300,
            batch_size=16,
            seq_len=256,
            log_every_steps=20,
            model=ModelConfig(
                num_layers=4,
                d_model=128,
                num_heads=2,
                num_kv_heads=1,
                d_head=64,
                d_ff=384,
                vocab_size=2048,
            ),
            precision=PrecisionConfig(compute="float32"),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=20),
            data=DataConfig(tokenizer="bpe", validation_fraction=0.01),
            checkpoint=CheckpointConfig(every_steps=100),
        )
    )
