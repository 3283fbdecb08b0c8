"""A 1.1B Llama-shaped decoder on one 80 GB GPU, in bfloat16.

Command:
    scaletrain train --config=experiments/llama_1b.py --workdir=runs/llama_1b \
        --config.data.source=files --config.data.path='corpus/*.parquet'
Hardware: one H100 or H200.
Run: see README, "Measured".

ARG: `synthetic` trains on random tokens, to look at speed alone.
"""

from scaletrain.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    RunConfig,
    to_config_dict,
)


def get_config(arg: str = ""):
    """Returns the settings; `arg` may be "synthetic"."""
    if arg not in ("", "synthetic"):
        raise ValueError(f"ARG={arg}; unknown; use synthetic or none")
    data = DataConfig(source="synthetic") if arg else DataConfig(tokenizer="bpe")
    return to_config_dict(
        RunConfig(
            num_steps=20_000,
            batch_size=64,
            seq_len=4096,
            accumulate_steps=16,
            eval_every_steps=1000,
            model=ModelConfig(
                num_layers=16,
                d_model=2048,
                num_heads=32,
                num_kv_heads=8,
                d_head=64,
                d_ff=8192,
                vocab_size=32_768,
                rope=RopeConfig(base=500_000.0),
                layers="unroll",
                remat="none",
            ),
            optim=OptimConfig(learning_rate=4e-4, warmup_steps=500),
            data=data,
            checkpoint=CheckpointConfig(every_steps=1000, keep_every_steps=5000),
        )
    )
