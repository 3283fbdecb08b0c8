"""The story of every setting: explained, printed on the reference page, and obeyed."""

import json
import subprocess
import sys

import pages
import pytest
import small

from scaletrain import config
from scaletrain.commands import line
from scaletrain.config import RunConfig, explain
from scaletrain.errors import ConfigError

CONDITIONS = [
    (path, condition)
    for path, field in config.FIELDS.items()
    for condition in field.metadata["used_when"]
]


def explained(*words):
    """Returns the finished process of `scaletrain config --explain` in a new Python.

    It fails if anything imports jax.
    """
    code = (
        "import sys; from scaletrain import main\n"
        "try: main.main()\n"
        "finally: assert 'jax' not in sys.modules"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "config", *words],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", pages.PAGES)
def test_reference_pages_are_those_the_code_makes(name):
    """`make reference` writes them."""
    assert (pages.FOLDER / name).read_text("utf-8") == pages.PAGES[name]()


def test_every_setting_has_a_row_on_the_page():
    rows = [line for line in explain.page().splitlines() if line.startswith("| `")]
    paths = [row.split("`")[1] for row in rows]
    assert sorted(paths) == sorted(path for path, _, _ in config.leaves(RunConfig()))


def test_every_doc_is_a_sentence():
    for story in explain.stories():
        doc = story["doc"]
        assert doc[:1].isupper(), story["setting"]
        assert doc.endswith("."), story["setting"]


def test_one_setting_is_explained_without_an_experiment():
    done = explained("--explain", "optim.decay_steps")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "optim.decay_steps = 0\n"
        "    Last optimizer steps, in which wsd falls; 0 = a fifth of num_steps.\n"
        "    values: whole number, 0 or more\n"
        "    used: when optim.schedule is wsd\n"
        "    resume: may change\n"
    )


def test_a_group_is_explained_as_json():
    done = explained("--explain=lora", "--json")
    stories = json.loads(done.stdout)
    assert [each["setting"] for each in stories] == [
        "lora.rank", "lora.alpha", "lora.targets",
    ]  # fmt: skip
    assert stories[1]["used_when"] == ["lora.rank is not 0"]
    assert (stories[0]["default"], stories[0]["least"]) == (0, 0)
    assert stories[0]["resume"] == "fixed"


def test_all_are_explained_where_none_is_named():
    assert [each["setting"] for each in explain.stories()] == list(config.FIELDS)


@pytest.mark.parametrize(
    ("path", "near"),
    [("optm.b1", "optim.b1"), ("optin", "optim"), ("model.rop", "model.rope")],
)
def test_a_mistyped_path_is_refused_with_the_nearest(path, near):
    with pytest.raises(ConfigError, match=f"explain={path}; .*did you mean {near}?"):
        explain.stories(path)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--explain", "--config=a.py"], "not allowed with"),
        (["--explain", "--config.seed=1"], "config.seed=1; no effect with --explain"),
        ([], "--config --explain is required"),
    ],
)
def test_what_does_not_go_with_an_explanation_is_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        line.read(["config", *words])


def other(path):
    """Returns a value of a setting that is in its range and not the default."""
    field, value = config.FIELDS[path], config.get(RunConfig(), path)
    if isinstance(value, tuple):
        return ("query",)
    if field.metadata["choices"]:
        return next(each for each in field.metadata["choices"] if each != value)
    if isinstance(value, str):
        return "other"
    most = field.metadata["most"]
    return value + 1 if most is None or value + 1 <= most else most / 2


@pytest.mark.parametrize(("path", "condition"), CONDITIONS)
def test_a_setting_that_is_not_used_is_refused(path, condition):
    """Each condition that the schema states, where it does not hold."""
    switch, values, negated = condition
    kinds = config.FIELDS[switch].metadata["choices"]
    off = values[0] if negated else next(each for each in kinds if each not in values)
    run = config.applied(small.RUN, {path: other(path), switch: off})
    words = f"{path}={other(path)!r}; no effect with {switch}={off}; "
    assert any(problem.startswith(words) for problem in config.problems(run))


@pytest.mark.parametrize("path", config.FIELDS)
def test_what_changed_stops_a_resume_unless_the_setting_says_it_may(path):
    now = config.applied(RunConfig(), {path: other(path)})
    fixed, free = config.differences(RunConfig(), now)
    lines = free if _may_change(path) else fixed
    assert [line.split(":")[0] for line in lines] == [path]
    assert len(fixed + free) == 1


def _may_change(path):
    """Returns the answer by hand, from the words that users were promised."""
    if path in ("optim.name", "data.format"):
        return False
    groups = ("mesh", "optim", "checkpoint", "eval", "data")
    return path.split(".")[0] in groups or path in (
        "num_steps", "accumulate_steps", "log_every_steps", "eval_every_steps",
        "watchdog_s", "init_from", "family", "model.layers", "model.remat",
        "model.remat_save", "model.remat_offload", "model.attention",
        "precision.compute", "precision.reduce", "precision.gradients",
    )  # fmt: skip


def test_adapters_hold_on_to_the_weights_they_adapt():
    adapted = small.changed(small.RUN, lora__rank=4, init_from="one")
    moved = small.changed(adapted, init_from="two")
    assert config.differences(adapted, moved) == (
        ["init_from: 'one' then, 'two' now"], [],
    )  # fmt: skip
