"""The settings' form, their way in and what must hold between them."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import small

from scaletrain import config
from scaletrain.config import AxesConfig, MeshConfig, RunConfig
from scaletrain.errors import ConfigError

EXPERIMENT = """
from scaletrain.config import RunConfig, to_config_dict
def get_config(arg="none"):
    form = to_config_dict(RunConfig(num_steps=7))
    {body}
    return form
"""


@pytest.fixture
def experiment(tmp_path):
    def write(body="pass"):
        path = tmp_path / "experiment.py"
        path.write_text(EXPERIMENT.format(body=body))
        return str(path)

    return write


def test_round_trips():
    run = small.changed(RunConfig(), model__remat="save", model__remat_save=("query",))
    assert config.from_config_dict(config.to_config_dict(run)) == (run, [])
    assert config.from_json(config.to_json(run)) == run


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "[]", "null", '{"seed": 1', '{"model.d_model": 3}',
        '{"__class__": 1}', 100_000 * "[",
    ],
)  # fmt: skip
def test_what_are_no_settings_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--config=.*config.json; .*as a run"):
        config.load(str(path))
    with pytest.raises(ConfigError, match="there; .*as a run"):
        config.from_json(text, "there")


def test_a_number_that_no_float_holds_is_refused():
    with pytest.raises(ConfigError, match="learning_rate=1000.*int where float"):
        config.from_json(json.dumps({"optim": {"learning_rate": 10**400}}))


def test_defaults_are_sound():
    assert config.problems(RunConfig()) == []


def test_overrides_reach_every_kind_of_setting(experiment):
    run = config.load(
        experiment(),
        [
            ("num_steps", "1_000"),
            ("optim.learning_rate", "1"),
            ("model.remat", "save"),
            ("model.remat_save", "query, key"),
            ("mesh.dcn.data", "2"),
            ("num_steps", "9"),
        ],
    )
    assert (run.num_steps, run.optim.learning_rate) == (9, 1.0)
    assert run.model.remat_save == ("query", "key")
    assert run.mesh.dcn == AxesConfig(data=2)


def test_references_inside_an_experiment_follow_overrides(experiment):
    body = "form.optim.warmup_steps = form.get_ref('num_steps') // 2"
    run = config.load(experiment(body), [("num_steps", "100")])
    assert run.optim.warmup_steps == 50


def test_overrides_reach_groups_that_a_form_lacks(experiment, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": 3}')
    run = config.load(str(path), [("optim.b1", "0.8"), ("mesh.dcn.data", "2")])
    assert (run.seed, run.optim.b1, run.mesh.dcn.data) == (3, 0.8, 2)
    body = "from ml_collections import ConfigDict; form = ConfigDict({'seed': 4})"
    run = config.load(experiment(body), [("model.rope.base", "5")])
    assert (run.seed, run.model.rope.base) == (4, 5.0)


def test_an_override_may_be_of_a_finer_type_than_the_form(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"optim": {"learning_rate": 1}, "model": {"remat_save": []}}')
    overrides = [
        ("optim.learning_rate", "0.5"), ("model.remat", "save"),
        ("model.remat_save", "key,value"),
    ]  # fmt: skip
    run = config.load(str(path), overrides)
    assert run.optim.learning_rate == 0.5
    assert run.model.remat_save == ("key", "value")


def test_flags_are_read_as_the_overrides_they_spell(experiment):
    overrides = {
        "optim.learning_rate": 0.125, "model.remat": "save",
        "model.remat_save": ("query", "key"), "mesh.dcn.data": 2,
    }  # fmt: skip
    words = [word.removeprefix("--config.") for word in config.flags(overrides)]
    run = config.load(experiment(), [tuple(word.split("=")) for word in words])
    assert run == config.applied(RunConfig(num_steps=7), overrides)
    assert config.changes(RunConfig(num_steps=7), overrides) == overrides
    assert config.changes(run, overrides) == {}


def test_argument_reaches_get_config(experiment):
    path = experiment("form.seed = len(arg)")
    assert config.load(path + ":abcdef").seed == 6
    assert config.load(path).seed == 4


def test_colons_of_a_path_are_not_an_argument(experiment, tmp_path):
    folder = tmp_path / "2026-01-31T12:30:00"
    folder.mkdir()
    body = "form.seed = len(arg); form.family = 'gpt2' if arg == 'a:b' else ''"
    path = folder / "settings.py"
    path.write_text(pathlib.Path(experiment(body)).read_text())
    assert config.load(str(path)).seed == len("none")
    assert config.load(f"{path}:a:b").family == "gpt2"
    (folder / "config.json").write_text(config.to_json(RunConfig(seed=5)))
    assert config.load(str(folder / "config.json")).seed == 5
    assert config.file_and_argument("nowhere.py:a:b") == ("nowhere.py", "a:b")


def test_an_experiment_may_postpone_the_annotations_of_its_dataclasses(tmp_path):
    path = tmp_path / "typed.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from scaletrain.config import RunConfig, to_config_dict\n"
        "@dataclasses.dataclass\n"
        "class Size:\n"
        "    seed: int = 3\n"
        "def get_config():\n"
        "    return to_config_dict(RunConfig(seed=Size().seed))\n"
    )
    assert config.load(str(path)).seed == 3


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("2.0", 2), ("1_0", 10)])
def test_whole_numbers_may_be_written_as_floats(experiment, text, value):
    assert config.load(experiment(), [("num_steps", text)]).num_steps == value


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "1e999", "", "ten"])
def test_other_numbers_are_not_whole(experiment, text):
    with pytest.raises(ConfigError, match="num_steps=.*; not a whole number; give a"):
        config.load(experiment(), [("num_steps", text)])


FILES = [("data.source", "files"), ("data.path", "x")]


@pytest.mark.parametrize(
    "path", ["init_from", "data.path", "data.tokenizer", "data.cache_dir"]
)
def test_every_path_among_the_settings_may_begin_at_home(
    experiment, path, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = config.load(experiment(), [*FILES, (path, "~/runs/a")])
    read = {name: value for name, _, value in config.leaves(run)}
    assert read[path] == f"{tmp_path}/runs/a"
    with pytest.raises(ConfigError, match=f"{path}=~no.one/a; no such home folder"):
        config.load(experiment(), [*FILES, (path, "~no.one/a")])


@pytest.mark.parametrize("path", ["init_from", "data.cache_dir"])
@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://a/b", "file:///a"])
def test_settings_that_are_folders_are_no_urls(experiment, path, url):
    with pytest.raises(ConfigError, match=f"{path}={url}; a URL where only local"):
        config.load(experiment(), [*FILES, (path, url)])
    run = config.load(experiment(), [*FILES, ("data.path", url)])
    assert run.data.path == url


def test_all_problems_are_told_at_once(experiment):
    overrides = [
        ("modle.num_layers", "3"),
        ("num_steps", "ten"),
        ("optim.name", "adam"),
        ("mesh.tensor", "0"),
        ("optim.b2", "1.5"),
        ("data.path", "x"),
    ]
    with pytest.raises(ConfigError) as caught:
        config.load(experiment(), overrides)
    assert [p.split("=")[0] for p in caught.value.problems] == [
        "modle.num_layers",
        "num_steps",
        "mesh.tensor",
        "optim.name",
        "optim.b2",
        "data.path",
    ]
    assert "did you mean model.num_layers?" in str(caught.value)


def test_a_mistyped_value_in_an_experiment_is_told(experiment):
    body = (
        "from ml_collections import ConfigDict; "
        "form = ConfigDict(form.to_dict() | {'seq_len': 1.5, 'sede': 1})"
    )
    with pytest.raises(ConfigError, match=r"seq_len=1.5; float where int") as caught:
        config.load(experiment(body))
    assert "sede=1; no such setting; did you mean seed?" in str(caught.value)


def test_an_experiment_that_raises_is_told(experiment):
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        config.load(experiment("1 / 0"))
    with pytest.raises(ConfigError, match="returned NoneType"):
        config.load(experiment("return None"))


# One line for each rule: the settings that break it, and words of the answer.
BROKEN = [
    ({"model__num_kv_heads": 3}, "model.num_kv_heads=3; does not divide"),
    ({"model__d_head": 7}, "model.d_head=7; odd"),
    ({"model__remat": "save"}, "names nothing to save"),
    (
        {"model__remat": "save", "model__remat_save": ("querry",)},
        "model.remat_save=querry; no value has that name",
    ),
    ({"model__remat_save": ("query",)}, "model.remat_save=.*no effect"),
    (
        {"model__positions": "learned", "model__max_positions": 31},
        "model.max_positions=31; learned positions for fewer tokens than seq_len=32",
    ),
    (
        {"model__global_every": 2},
        "global_every=2; no effect with model.sliding_window=0",
    ),
    (
        {"model__rope__factor": 8.0},
        "rope.factor=8.0; no effect with model.rope.scaling",
    ),
    ({"precision__scaling": "delayed"}, "scaling='delayed'; no effect with precision"),
    (
        {"precision__matmul": "int8", "precision__scaling": "delayed"},
        "precision.scaling='delayed'; no effect with precision.matmul=int8",
    ),
    ({"precision__targets": ("mlp/*",)}, "targets=.*no effect with precision.matmul"),
    (
        {"precision__matmul": "fp8", "precision__targets": ("mlp/*", "head")},
        "precision.targets=head; no matrix has that name",
    ),
    (
        {"precision__matmul": "fp8", "precision__targets": ()},
        "precision.targets=.*nothing would be multiplied",
    ),
    (
        {"model__attention": "splash", "seq_len": 96},
        "attention=splash; its blocks do not divide seq_len=96; make seq_len a mult",
    ),
    (
        {"model__attention": "splash", "seq_len": 128, "mesh__context": 2},
        "attention=splash; mesh.context=2 cuts sequences, which it takes whole; set",
    ),
    (
        {"model__attention": "cudnn", "precision__compute": "float32"},
        "attention=cudnn; it does not multiply precision.compute=float32; set",
    ),
    (
        {"model__attention": "cudnn", "model__attention_soft_cap": 5.0},
        "attention=cudnn; it has no model.attention_soft_cap=5.0; set it to 0",
    ),
    (
        {"model__attention": "cudnn", "model__d_head": 136},
        "attention=cudnn; model.d_head=136 is not a multiple of 8 up to 128",
    ),
    (
        {"model__attention": "cudnn", "seq_len": 32},
        "attention=cudnn; its blocks do not divide seq_len=32; make seq_len a mult",
    ),
    ({"accumulate_steps": 3}, "accumulate_steps=3; does not divide"),
    ({"optim__accumulate": "multi_steps"}, "no effect with accumulate_steps=1"),
    ({"mesh__data": -1, "mesh__fsdp": -1}, "leave one axis free"),
    ({"mesh__data": -2}, "mesh.data=-2; below -1"),
    ({"mesh__expert": 2}, "mesh.expert=2; the model has no experts"),
    ({"mesh__stage": 2}, "mesh.stage=2; layers cannot be split"),
    ({"mesh__tensor": 4}, "mesh.tensor=4; does not divide model.num_kv_heads=2"),
    ({"mesh__fsdp": 3}, "mesh.fsdp=3; does not divide model.d_model=32"),
    ({"mesh__context": 3}, "mesh.context=3; does not divide seq_len=32"),
    ({"mesh__data": 32}, "batch_size=16; 16 sequences at a time"),
    ({"mesh__data": 32, "accumulate_steps": 4}, "make batch_size a multiple of 128."),
    (
        {"mesh__data": 16, "accumulate_steps": 4},
        "make batch_size a multiple of 64, or set accumulate_steps=1.",
    ),
    (
        {
            "mesh__data": 16,
            "accumulate_steps": 4,
            "optim__accumulate": "multi_steps",
        },
        "make batch_size a multiple of 64.",
    ),
    (
        {"mesh__data": 8, "accumulate_steps": 4},
        "make batch_size a multiple of 32, or set accumulate_steps=2.",
    ),
    ({"optim__learning_rate": 0.0}, "optim.learning_rate=0; nothing"),
    ({"optim__learning_rate": float("nan")}, "optim.learning_rate=nan; not finite"),
    ({"optim__warmup_steps": 20}, "optim.warmup_steps=20; the run has num_steps=20"),
    (
        {"optim__schedule": "wsd", "optim__decay_steps": 15, "optim__warmup_steps": 6},
        "optim.decay_steps=15; with optim.warmup_steps=6",
    ),
    (
        {"optim__spike_window": 64},
        "optim.spike_window=64; no effect with optim.spike_s",
    ),
    ({"optim__decay_steps": 5}, "optim.decay_steps=5; no effect"),
    ({"optim__schedule": "constant", "optim__final_ratio": 0.5}, "final_ratio=0.5; no"),
    ({"optim__b1": 1.0}, "optim.b1=1; the average would never move"),
    ({"optim__name": "sgd", "optim__b2": 0.9}, "optim.b2=0.9; no effect"),
    ({"optim__name": "lion", "optim__eps": 1e-6}, "optim.eps=1e-06; no effect"),
    (
        {"optim__weight_decay": 0.0, "optim__decay_embeddings": "yes"},
        "optim.decay_embeddings='yes'; no effect",
    ),
    ({"data__source": "files"}, "data.path=''; data.source=files reads from it"),
    ({"data__source": "tfds"}, "give a data set's name"),
    ({"data__source": "stdlib"}, "model.vocab_size=64; data.tokenizer=bytes"),
    ({"data__tokenizer": "bpe"}, "data.tokenizer='bpe'; no effect"),
    ({"data__split": "test"}, "data.split='test'; no effect"),
    (
        {
            "data__source": "stdlib",
            "model__vocab_size": 512,
            "data__end_of_text": "<e>",
        },
        "data.end_of_text='<e>'; no effect",
    ),
    (
        {
            "data__source": "stdlib",
            "model__vocab_size": 512,
            "data__validation_fraction": 0.0,
            "eval_every_steps": 5,
        },
        "eval_every_steps=5; data.validation_fraction=0",
    ),
    ({"checkpoint__keep_every_steps": 5}, "no effect with checkpoint.every_steps=0"),
    (
        {"checkpoint__keep_every_steps": 5, "checkpoint__every_steps": 2},
        "keep_every_steps=5; not a multiple",
    ),
    ({"seed": -1}, "seed=-1; below 0"),
    ({"seed": 2**32}, "seed=4294967296; above"),
]


@pytest.mark.parametrize(("settings", "words"), BROKEN)
def test_each_rule_is_told(settings, words):
    assert config.problems(small.RUN) == []
    with pytest.raises(ConfigError, match=words):
        config.check(small.changed(small.RUN, **settings))


def test_the_free_axis_takes_what_is_left():
    run = small.changed(small.RUN, mesh__data=-1, mesh__tensor=2)
    assert config.resolve(run, 8).mesh == MeshConfig(data=4, tensor=2)
    run = small.changed(small.RUN, mesh__fsdp=2, mesh__dcn__data=-1)
    assert config.resolve(run, 8).mesh.dcn == AxesConfig(data=4)


def test_axes_must_multiply_to_the_devices():
    with pytest.raises(ConfigError, match=r"mesh=\(fsdp=4\); 8 devices are here"):
        config.resolve(small.changed(small.RUN, mesh__fsdp=4), 8)
    with pytest.raises(ConfigError, match="mesh.tensor=8; does not divide"):
        config.resolve(small.changed(small.RUN, mesh__tensor=-1), 8)


def test_differences_tell_model_and_data_from_the_rest():
    now = small.changed(
        small.RUN,
        num_steps=30,
        model__d_ff=128,
        model__layers="unroll",
        seed=1,
        data__path="x",
        data__format="chat",
    )
    held, free = config.differences(small.RUN, now)
    assert held == [
        "seed: 0 then, 1 now",
        "model.d_ff: 64 then, 128 now",
        "data.format: 'text' then, 'chat' now",
    ]
    free = [line.split(":")[0] for line in free]
    assert free == ["num_steps", "model.layers", "data.path"]


def test_the_set_of_settings_is_frozen(golden):
    """A new setting is a promise to keep: add it here on purpose."""
    golden(
        "settings.txt", "\n".join(p for p, _, _ in config.leaves(RunConfig())) + "\n"
    )


def test_sizes_of_a_mesh_and_of_a_batch_follow_from_the_axes():
    mesh = MeshConfig(data=2, fsdp=4, tensor=2, dcn=AxesConfig(data=3))
    run = small.changed(small.RUN, mesh=mesh, batch_size=96, accumulate_steps=2)
    assert [mesh.size(axis) for axis in ("data", "fsdp", "tensor", "stage")] == [
        6, 4, 2, 1,
    ]  # fmt: skip
    assert (mesh.num_devices, mesh.num_slices) == (48, 3)
    assert (run.batch_shards, run.micro_batch_rows, run.shard_rows) == (24, 48, 2)
    assert MeshConfig(fsdp=-1, tensor=2).num_devices is None
    assert MeshConfig(dcn=AxesConfig(data=-1)).num_devices is None


@pytest.mark.parametrize(
    ("window", "every", "wanted"), [(0, 0, "...."), (8, 0, "llll"), (8, 3, "ll.l")]
)
def test_a_layer_is_local_unless_it_is_the_nth(window, every, wanted):
    model = small.changed(
        small.MODEL, num_layers=4, sliding_window=window, global_every=every
    )
    kinds = "".join("l" if model.is_local(layer) else "." for layer in range(4))
    assert kinds == wanted
    traced = model.is_local(np.arange(4))  # as inside a scan
    assert np.broadcast_to(traced, 4).tolist() == [kind == "l" for kind in kinds]


def test_json_is_plain():
    assert json.loads(config.to_json(RunConfig()))["mesh"]["dcn"]["data"] == 1
    assert dataclasses.asdict(RunConfig())["num_steps"] == 100
