"""Wrong requests: one screen, exit code 2, no traceback, nothing written."""

import os
import pathlib
import subprocess
import sys

import pytest

from scaletrain import config

HERE = pathlib.Path(__file__).parent
LLAMA = HERE / "reference" / "llama"
QUICKSTART = "--config=" + str(HERE.parent / "experiments" / "quickstart.py")

# (arguments; {w} is an empty workdir), (words of the answer)
WRONG = [
    ([], "COMMAND"),
    (["tran"], "invalid choice: 'tran'"),
    (["train"], "required: --config, --workdir"),
    (["train", QUICKSTART], "required: --workdir"),
    (["import", "--workdir={w}"], "required: --from"),
    (["import", "--from=nowhere", "--workdir={w}/x"], "--from=nowhere; no such folder"),
    (
        ["import", f"--from={LLAMA}", "--workdir={w}/x", "--config.modle.d_ff=1"],
        "modle.d_ff=1; no such setting",
    ),
    (["export", "--workdir={w}", "--to={w}/x"], "no config.json there"),
    (["eval", "--workdir={w}", "--save_logits=x.npy"], "no effect without --tokens"),
    (["generate", "--workdir={w}", "--prompt_ids=1,x"], "--prompt_ids: invalid"),
    (["train", "--config=nowhere.py", "--workdir={w}"], "--config=nowhere.py; no such"),
    (
        ["train", QUICKSTART.replace("start", "strat"), "--workdir={w}"],
        "did you mean .*quickstart.py?",
    ),
    (["train", QUICKSTART, "--workdir={w}", "--wrokdir=x"], "did you mean --workdir?"),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.modle.d_ff=1"],
        "modle.d_ff=1; no such setting; did you mean model.d_ff?",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--confg.seed=1"],
        "did you mean --config.seed?",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.num_steps=many"],
        "num_steps=many; not a whole number",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.num_steps"],
        "--config.num_steps; no value",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.num_steps=0"],
        "num_steps=0; below 1",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.optim.name=adam"],
        "optim.name='adam'; unknown; pick one of adamw",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.mesh.fsdp=3"],
        "mesh.fsdp=3; does not divide model.d_model",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.mesh.data=2"],
        r"mesh=\(data=2\); 1 devices are here",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.data.path=x"],
        "data.path='x'; no effect with data.source=stdlib",
    ),
    (
        [
            "train", QUICKSTART, "--workdir={w}", "--config.data.source=files",
            "--config.data.path={w}/*.txt",
        ],
        "data.path=.*; .*; ",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.data.tokenizer={w}/no.json"],
        "data.tokenizer=.*no.json",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.data.tokenizer=bytes",
         "--config.model.vocab_size=100"],
        "model.vocab_size=100; data.tokenizer=bytes has at least 257",
    ),
    (
        ["train", QUICKSTART, "--workdir={w}", "--config.precision.compute=fp8"],
        "precision.compute='fp8'; unknown",
    ),
    (["train", QUICKSTART, "--workdir={w}", "--process_id=1"], "only some are given"),
    (["train", QUICKSTART, "--workdir=/dev/null/x"], "--workdir=/dev/null/x; .*; give"),
    (["eval", "--workdir={w}"], "no config.json there"),
    (["eval", QUICKSTART, "--workdir={w}"], "no whole checkpoint there"),
    (["eval", QUICKSTART, "--workdir={w}", "--split=test"], "invalid choice: 'test'"),
    (["generate", "--workdir={w}", "--prompt=x"], "no config.json there"),
    (["generate", QUICKSTART, "--workdir={w}", "--top_p=2"], "--top_p=2.0; outside"),
    (["bench", QUICKSTART, "--steps=0"], "--steps=0; below 1"),
    (["bench", QUICKSTART, "--workdir={w}"], "--workdir=.*; no effect without --prof"),
    (["bench", QUICKSTART, "--config.mesh.data=2"], r"mesh=\(data=2\); 1 devices are"),
    (["config", QUICKSTART, "--config.seed=-1", "--config.seq_len=1.5"], "not a whole"),
]  # fmt: skip


def scaletrain(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "scaletrain.main", *args],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(("args", "words"), WRONG)
def test_wrong_requests(args, words, tmp_path):
    workdir = tmp_path / "workdir"
    done = scaletrain(
        *(arg.replace("{w}", str(workdir)) for arg in args),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    import re

    assert done.returncode == 2, done.stderr
    assert re.search(words, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) < 24
    assert not workdir.exists() or not list(workdir.iterdir())


def test_all_problems_come_together():
    done = scaletrain(
        "train", QUICKSTART, "--workdir=x", "--bogus", "--config.num_steps=x",
        "--config.optim.b1=7", "--config.what=1",
    )  # fmt: skip
    assert done.returncode == 2
    for words in ("--bogus", "num_steps=x", "optim.b1=7.0", "what=1"):
        assert words in done.stderr


def test_help_and_refusals_do_not_wait_for_jax():
    code = (
        "import sys; sys.argv = ['scaletrain', {args}]\n"
        "from scaletrain.main import main\n"
        "try: main()\n"
        "except SystemExit: print('jax' in sys.modules, file=sys.stderr)"
    )
    for args in ("'--help'", f"'train', {QUICKSTART!r}, '--workdir=x', '--config.a=1'"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(args=args)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr.strip().splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["train", "eval", "generate", "config", "bench"])
def test_every_command_has_help(command):
    done = scaletrain(command, "--help")
    assert done.returncode == 0
    assert "--config.a.b=value" in done.stdout
    assert "75 interrupted" in done.stdout


def test_config_prints_settings_that_are_settings(tmp_path):
    done = scaletrain("config", QUICKSTART, "--json", "--config.seed=9")
    path = tmp_path / "again.json"
    path.write_text(done.stdout)
    assert config.load(str(path)).seed == 9
    table = scaletrain("config", QUICKSTART).stdout
    assert "blocks/attention/q/weight" in table
    assert "parameters" in table.splitlines()[-1]
