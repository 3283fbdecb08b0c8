"""Published models by name, to train from scratch or from their published weights.

Command:
    scaletrain train --config=experiments/families.py:llama3-8b --workdir=runs/mine \
        --config.data.source=files --config.data.path='corpus/*.parquet' \
        --config.data.tokenizer=/path/to/tokenizer.json
    and to start with published weights, --config.init_from=WORKDIR that holds them.
Hardware: any number of devices that divides 64, parameters and batch split over all of
    them; where memory is short, raise --config.accumulate_steps.
Run: gemma3-1b is lowered for four TPU chips in the test suite; never trained by us.

ARG: a name in the tables below. The settings of a model are those of the config.json
in the repository of that name: the base model's, but for Qwen3 and Phi-3 the chat
model's.
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

# Each row: layers, d_model, heads, key/value heads, d_head, d_ff; then the columns that
# a comment beside the table names.
LLAMA2 = {
    "llama2-7b": (32, 4096, 32, 32, 128, 11_008),
    "llama2-13b": (40, 5120, 40, 40, 128, 13_824),
    "llama2-70b": (80, 8192, 64, 8, 128, 28_672),
}
LLAMA3 = {  # head, factor of rope's scaling
    "llama3-8b": (32, 4096, 32, 8, 128, 14_336, "untied", 1.0),
    "llama3-70b": (80, 8192, 64, 8, 128, 28_672, "untied", 1.0),
    "llama3.1-8b": (32, 4096, 32, 8, 128, 14_336, "untied", 8.0),
    "llama3.1-70b": (80, 8192, 64, 8, 128, 28_672, "untied", 8.0),
    "llama3.1-405b": (126, 16_384, 128, 8, 128, 53_248, "untied", 8.0),
    "llama3.2-1b": (16, 2048, 32, 8, 64, 8192, "tied", 32.0),
    "llama3.2-3b": (28, 3072, 24, 8, 128, 8192, "tied", 32.0),
}
MISTRAL = {
    "mistral-7b-v0.1": (32, 4096, 32, 8, 128, 14_336),
}
QWEN2 = {  # head, vocabulary, positions, norm's epsilon
    "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, "tied", 151_936, 32_768, 1e-6),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960, "tied", 151_936, 131_072, 1e-6),
    "qwen2.5-3b": (36, 2048, 16, 2, 128, 11_008, "tied", 151_936, 32_768, 1e-6),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18_944, "untied", 152_064, 131_072, 1e-6),
    "qwen2.5-14b": (48, 5120, 40, 8, 128, 13_824, "untied", 152_064, 131_072, 1e-5),
    "qwen2.5-32b": (64, 5120, 40, 8, 128, 27_648, "untied", 152_064, 131_072, 1e-5),
    "qwen2.5-72b": (80, 8192, 64, 8, 128, 29_568, "untied", 152_064, 131_072, 1e-5),
}
QWEN3 = {  # head
    "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, "tied"),
    "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, "tied"),
    "qwen3-4b": (36, 2560, 32, 8, 128, 9728, "tied"),
    "qwen3-8b": (36, 4096, 32, 8, 128, 12_288, "untied"),
    "qwen3-14b": (40, 5120, 40, 8, 128, 17_408, "untied"),
    "qwen3-32b": (64, 5120, 64, 8, 128, 25_600, "untied"),
}
OLMO2 = {
    "olmo2-1b": (16, 2048, 16, 16, 128, 8192),
    "olmo2-7b": (32, 4096, 32, 32, 128, 11_008),
    "olmo2-13b": (40, 5120, 40, 40, 128, 13_824),
    "olmo2-32b": (64, 5120, 40, 8, 128, 27_648),
}
PHI3 = {
    "phi3-mini-4k": (32, 3072, 32, 32, 96, 8192),
    "phi3-medium-4k": (40, 5120, 40, 10, 128, 17_920),
}
GEMMA2 = {  # scores are divided by the root of this
    "gemma2-2b": (26, 2304, 8, 4, 256, 9216, 256),
    "gemma2-9b": (42, 3584, 16, 8, 256, 14_336, 256),
    "gemma2-27b": (46, 4608, 32, 16, 128, 36_864, 144),
}
GEMMA3 = {  # as Gemma 2's, vocabulary, positions, window, factor of rope's scaling
    "gemma3-270m": (18, 640, 4, 1, 256, 2048, 256, 262_144, 32_768, 512, 1.0),
    "gemma3-1b": (26, 1152, 4, 1, 256, 6912, 256, 262_144, 32_768, 512, 1.0),
    "gemma3-4b": (34, 2560, 8, 4, 256, 10_240, 256, 262_208, 131_072, 1024, 8.0),
    "gemma3-12b": (48, 3840, 16, 8, 256, 15_360, 256, 262_208, 131_072, 1024, 8.0),
    "gemma3-27b": (62, 5376, 32, 16, 128, 21_504, 168, 262_208, 131_072, 1024, 8.0),
}
GPT2 = {
    "gpt2-124m": (12, 768, 12, 12, 64, 3072),
    "gpt2-355m": (24, 1024, 16, 16, 64, 4096),
    "gpt2-774m": (36, 1280, 20, 20, 64, 5120),
    "gpt2-1558m": (48, 1600, 25, 25, 64, 6400),
}


def _model(sizes, **settings):
    num_layers, d_model, num_heads, num_kv_heads, d_head, d_ff = sizes
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_head=d_head,
        d_ff=d_ff,
        remat="full",
        **settings,
    )


def _llama2(*sizes):
    return _model(sizes, vocab_size=32_000, max_positions=4096, norm_eps=1e-5)


def _llama3(*row):
    *sizes, head, factor = row
    scaling = "llama3" if factor > 1 else "none"
    return _model(
        sizes,
        vocab_size=128_256,
        head=head,
        norm_eps=1e-5,
        max_positions=131_072 if factor > 1 else 8192,
        rope=RopeConfig(base=500_000.0, scaling=scaling, factor=factor),
    )


def _mistral(*sizes):
    return _model(
        sizes,
        vocab_size=32_000,
        norm_eps=1e-5,
        max_positions=32_768,
        sliding_window=4096,
    )


def _qwen2(*row):
    *sizes, head, vocab_size, max_positions, norm_eps = row
    return _model(
        sizes,
        vocab_size=vocab_size,
        head=head,
        bias="qkv",
        norm_eps=norm_eps,
        max_positions=max_positions,
        rope=RopeConfig(base=1_000_000.0),
    )


def _qwen3(*row):
    *sizes, head = row
    return _model(
        sizes,
        vocab_size=151_936,
        head=head,
        qk_norm="head",
        max_positions=40_960,
        rope=RopeConfig(base=1_000_000.0),
    )


def _olmo2(*sizes):
    return _model(
        sizes,
        vocab_size=100_352,
        norm_order="post",
        qk_norm="all",
        max_positions=4096,
        rope=RopeConfig(base=500_000.0),
    )


def _phi3(*sizes):
    return _model(
        sizes,
        vocab_size=32_064,
        norm_eps=1e-5,
        max_positions=4096,
        sliding_window=2047,
    )


def _gemma(sizes, divisor, **settings):
    return _model(
        sizes,
        mlp="geglu",
        head="tied",
        norm="rms_plus_one",
        norm_order="both",
        embed_scale=sizes[1] ** 0.5,
        attention_scale=divisor**-0.5,
        **settings,
    )


def _gemma2(*row):
    *sizes, divisor = row
    return _gemma(
        sizes,
        divisor,
        vocab_size=256_000,
        max_positions=8192,
        sliding_window=4096,
        global_every=2,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
    )


def _gemma3(*row):
    *sizes, divisor, vocab_size, max_positions, sliding_window, factor = row
    scaling = "linear" if factor > 1 else "none"
    return _gemma(
        sizes,
        divisor,
        vocab_size=vocab_size,
        qk_norm="head",
        max_positions=max_positions,
        sliding_window=sliding_window,
        global_every=6,
        rope=RopeConfig(
            base=1_000_000.0, local_base=10_000.0, scaling=scaling, factor=factor
        ),
    )


def _gpt2(*sizes):
    return _model(
        sizes,
        vocab_size=50_257,
        mlp="gelu",
        head="tied",
        bias="all",
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        max_positions=1024,
    )


TABLES = (
    ("llama", _llama2, LLAMA2),
    ("llama", _llama3, LLAMA3),
    ("mistral", _mistral, MISTRAL),
    ("qwen2", _qwen2, QWEN2),
    ("qwen3", _qwen3, QWEN3),
    ("olmo2", _olmo2, OLMO2),
    ("phi3", _phi3, PHI3),
    ("gemma2", _gemma2, GEMMA2),
    ("gemma3", _gemma3, GEMMA3),
    ("gpt2", _gpt2, GPT2),
)
MODELS = {
    name: (family, model, row)
    for family, model, rows in TABLES
    for name, row in rows.items()
}


def get_config(arg: str = ""):
    """Returns the settings: a quarter of a million tokens a step, at most.

    Args:
      arg: name of a model.
    """
    if arg not in MODELS:
        raise ValueError(f"ARG={arg}; unknown; use one of {', '.join(MODELS)}")
    family, make, row = MODELS[arg]
    model = make(*row)
    return to_config_dict(
        RunConfig(
            num_steps=10_000,
            batch_size=64,
            seq_len=min(4096, model.max_positions),
            eval_every_steps=1000,
            family=family,
            model=model,
            mesh=MeshConfig(fsdp=-1),
            optim=OptimConfig(learning_rate=1e-4, warmup_steps=500),
            data=DataConfig(tokenizer="bpe"),
            checkpoint=CheckpointConfig(every_steps=500, keep_every_steps=5000),
        )
    )
