"""experiments/families.py: the published sizes, to the last parameter and setting."""

import dataclasses
import pathlib
import runpy

import jax
import pytest
from flax import nnx

from scaletrain import config
from scaletrain.errors import ConfigError
from scaletrain.hf import families
from scaletrain.models import Decoder

FILE = pathlib.Path(__file__).parent.parent / "experiments" / "families.py"
NAMES = list(runpy.run_path(str(FILE))["MODELS"])

# Gemma 3 is published with what sees pictures: SigLIP, a projection of its 1152
# outputs to d_model, and a norm before it.
SIGLIP = 416_866_032
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "phi3-mini-4k": 3_821_079_552,
    "phi3-medium-4k": 13_960_238_080,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 4_300_079_472 - SIGLIP - 1152 * (2560 + 1),
    "gemma3-12b": 12_187_325_040 - SIGLIP - 1152 * (3840 + 1),
    "gemma3-27b": 27_432_406_640 - SIGLIP - 1152 * (5376 + 1),
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
}

# What published config.json files say of the model, one of each kind of table row.
STRETCHED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED = {
    "llama2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "llama3-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "max_position_embeddings": 8192, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "llama3.1-405b": {
        "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248,
        "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 128, "num_hidden_layers": 126,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, **STRETCHED}, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "llama3.2-1b": {
        "model_type": "llama", "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, **STRETCHED},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "mistral-7b-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen2.5-14b": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824,
        "max_position_embeddings": 131072, "max_window_layers": 48,
        "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "olmo2-7b": {
        "model_type": "olmo2", "attention_bias": False, "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "phi3-mini-4k": {
        "model_type": "phi3", "attention_bias": False, "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "gemma2-27b": {
        "model_type": "gemma2", "attention_bias": False,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608, "intermediate_size": 36864,
        "max_position_embeddings": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 256000,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text", "attention_bias": False,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768,
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560,
            "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gemma3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "head_dim": 128, "hidden_size": 5376,
            "intermediate_size": 21504, "num_attention_heads": 32,
            "num_hidden_layers": 62, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gpt2-1558m": {
        "model_type": "gpt2", "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 1600, "n_head": 25,
        "n_layer": 48, "n_positions": 1024, "vocab_size": 50257,
    },
}  # fmt: skip


def load(name):
    return config.load(f"{FILE}:{name}")


@pytest.mark.parametrize("name", NAMES)
def test_has_the_published_number_of_parameters(name):
    run = load(name)
    model = nnx.eval_shape(
        lambda: Decoder(run.model, run.precision, jax.random.key(run.seed))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_its_family_can_say_it(name):
    """Its config.json exists, and read again it is the same model."""
    run = load(name)
    _, told = families.of_model(run.family, run.model)
    family, model = families.of_config(told)
    assert family.name == run.family
    assert dataclasses.replace(model, remat="full") == run.model


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_what_the_published_file_says(name):
    run = load(name)
    family, model = families.of_config(PUBLISHED[name])
    assert family.name == run.family
    assert dataclasses.replace(model, remat="full") == run.model


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_one_device_and_on_sixty_four(name):
    run = load(name)
    assert run.seq_len <= run.model.max_positions
    for devices in (1, 8, 64):
        assert config.resolve(run, devices).mesh.fsdp == devices


@pytest.mark.parametrize("spec", [f"{FILE}", f"{FILE}:llama3-9b"])
def test_a_name_that_is_not_there_is_answered_with_those_that_are(spec):
    with pytest.raises(ConfigError) as caught:
        config.load(spec)
    assert all(name in str(caught.value) for name in NAMES)
    assert f"ARG={spec.removeprefix(str(FILE))[1:]}; unknown" in str(caught.value)
