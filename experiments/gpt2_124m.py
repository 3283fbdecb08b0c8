"""GPT-2 small's shape: 12 layers of 768, plain GELU branches, biases, a tied head.

Positions are rotary and norms are RMS, where GPT-2 learned positions and centred.

Command:
    scaletrain train --config=experiments/gpt2_124m.py --workdir=runs/gpt2_124m \
        --config.data.source=files --config.data.path='corpus/*.txt'
Hardware: one 24 GB GPU or larger, or any TPU slice.
Run: lowered for its mesh in the test suite; not trained to the end.
"""

from scaletrain.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    to_config_dict,
)


def get_config():
    """Returns the settings: half a million tokens a step, ten billion in all."""
    return to_config_dict(
        RunConfig(
            num_steps=19_000,
            batch_size=512,
            seq_len=1024,
            accumulate_steps=16,
            eval_every_steps=500,
            model=ModelConfig(
                num_layers=12,
                d_model=768,
                num_heads=12,
                num_kv_heads=12,
                d_head=64,
                d_ff=3072,
                vocab_size=50_304,
                mlp="gelu",
                head="tied",
                bias="all",
                norm_eps=1e-5,
            ),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=700),
            data=DataConfig(tokenizer="bpe"),
            checkpoint=CheckpointConfig(every_steps=500, keep_every_steps=5000),
        )
    )
