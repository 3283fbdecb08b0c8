"""Llama 3 8B on a TPU v5p slice of 64 chips (v5p-128, topology 4x4x4).

Command, on every host of the slice, /shared being storage they all see:
    scaletrain train --config=experiments/llama3_8b.py --workdir=/shared/llama3_8b \
        --config.data.path='gs://BUCKET/corpus/*.parquet' \
        --config.data.tokenizer=/path/to/tokenizer.json
Hardware: 64 chips of TPU v5p, parameters and batch split over all of them.
Run: lowered for its mesh in the test suite; never trained by us.
"""

from scaletrain.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    RunConfig,
    to_config_dict,
)


def get_config():
    """Returns the settings: the published sizes, two million tokens a step."""
    return to_config_dict(
        RunConfig(
            num_steps=100_000,
            batch_size=256,
            seq_len=8192,
            accumulate_steps=4,
            eval_every_steps=1000,
            model=ModelConfig(
                num_layers=32,
                d_model=4096,
                num_heads=32,
                num_kv_heads=8,
                d_head=128,
                d_ff=14_336,
                vocab_size=128_256,
                norm_eps=1e-5,
                rope=RopeConfig(base=500_000.0),
                remat="full",
            ),
            mesh=MeshConfig(fsdp=64),
            optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
            data=DataConfig(
                source="files", path="corpus/*.parquet", tokenizer="tokenizer.json"
            ),
            checkpoint=CheckpointConfig(every_steps=500, keep_every_steps=10_000),
        )
    )
