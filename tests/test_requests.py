"""Wrong requests: one screen, exit code 2, no traceback, nothing written."""

import errno
import fnmatch
import glob
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import small

from scaletrain import config, failures, main
from scaletrain.commands import line
from scaletrain.commands.command import Result
from scaletrain.errors import ConfigError

HERE = pathlib.Path(__file__).parent
LLAMA = HERE / "reference" / "llama"
QUICKSTART = "--config=" + str(HERE.parent / "experiments" / "quickstart.py")


@pytest.fixture(autouse=True)
def _process():
    """Gives the process back what `main` sets in it."""
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)


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
        r"mesh=\(data=2\); 1 device is here",
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
    (["train", QUICKSTART, "--workdir=gs://b/x"], "--workdir=gs://b/x; a URL where"),
    (["train", QUICKSTART, "--workdir=/dev/null/x"], "--workdir=/dev/null/x; .*; give"),
    (["eval", "--workdir={w}"], "no config.json there"),
    (["eval", QUICKSTART, "--workdir={w}"], "no whole checkpoint there"),
    (["eval", QUICKSTART, "--workdir={w}", "--split=test"], "invalid choice: 'test'"),
    (["generate", "--workdir={w}", "--prompt=x"], "no config.json there"),
    (["generate", QUICKSTART, "--workdir={w}", "--top_p=2"], "--top_p=2.0; outside"),
    (["bench", QUICKSTART, "--steps=0"], "--steps=0; below 1"),
    (["bench", QUICKSTART, "--workdir={w}"], "--workdir=.*; no effect without --prof"),
    (["bench", QUICKSTART, "--config.mesh.data=2"], r"mesh=\(data=2\); 1 device is"),
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


@pytest.mark.parametrize("url", ["gs://b/x", "s3://b/x", "file:///x", "hf://a/b"])
@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["train", QUICKSTART], "--workdir"),
        (["supervise", "--", "train", QUICKSTART], "--workdir"),
        (["eval"], "--workdir"),
        (["eval", "--tokens=x.npy", QUICKSTART, "--workdir=x"], "--save_logits"),
        (["eval", QUICKSTART, "--workdir=x"], "--tokens"),
        (["generate"], "--workdir"),
        (["bench", QUICKSTART, "--profile"], "--workdir"),
        (["import", "--from=x"], "--workdir"),
        (["import", "--workdir=x"], "--from"),
        (["export", "--to=x"], "--workdir"),
        (["export", QUICKSTART, "--workdir=x"], "--to"),
        (["train", QUICKSTART, "--workdir=x"], "--config.init_from"),
        (["config"], "--config"),
    ],
)
def test_a_url_is_no_local_path(args, option, url):
    with pytest.raises(ConfigError) as caught:
        line.read([*args, f"{option}={url}"])
    [problem] = caught.value.problems
    assert problem.startswith(f"{option.removeprefix('--config.')}={url}; a URL where")


def test_every_path_of_a_command_line_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(QUICKSTART.removeprefix("--config="), tmp_path / "mine.py")
    words = ["--config=~/mine.py", "--workdir=~/w", "--tokens=~/t", "--save_logits=~/l"]
    args, _ = line.read(["eval", *words])
    assert args.config == f"{tmp_path}/mine.py"
    assert args.workdir == f"{tmp_path}/w"
    assert (args.tokens, args.save_logits) == (f"{tmp_path}/t", f"{tmp_path}/l")
    args, _ = line.read(["import", "--from=~/f", "--workdir=~/w"])
    assert args.source == f"{tmp_path}/f"
    args, _ = line.read(["export", words[0], "--workdir=~/w", "--to=~/t"])
    assert args.to == f"{tmp_path}/t"


def test_a_reader_that_has_gone_is_not_told_of():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "scaletrain.main"]
    for args in (["config", QUICKSTART], ["--help"]):
        done = subprocess.run(
            [*command, *args], stdout=writer, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), args
    os.close(writer)


def test_results_that_a_full_disk_refuses_are_a_failure():
    with pathlib.Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "scaletrain.main", "config", QUICKSTART],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    assert done.returncode == 1
    assert "no space left on device; make room" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_without_chips_is_quiet_about_them():
    """With libtpu installed, as `plan` needs it, and no platform asked for."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "scaletrain.main", "config", QUICKSTART],
        capture_output=True, text=True, env=env, check=True,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize("chip", ["/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", ""])
def test_a_machine_with_chips_is_left_alone(chip, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(
        glob, "glob", lambda pattern: [chip] if fnmatch.fnmatch(chip, pattern) else []
    )
    main._silence_libtpu()
    assert os.environ.get("JAX_PLATFORMS") == (None if chip else "cpu")


def ends(monkeypatch, command, *args):
    """Returns the exit code of `main` with something else in a command's place."""
    name, *options = args
    small.replace_command(monkeypatch, name, command)
    monkeypatch.setattr(sys, "argv", ["scaletrain", name, QUICKSTART, *options])
    with pytest.raises(SystemExit) as caught:
        main.main()
    return caught.value.code


def failing(err):
    def command(run, args):
        raise err

    return command


@pytest.mark.parametrize(
    ("err", "code", "words"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            2,
            "a/b; permission",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", b"a"),
            2,
            "a; not a direc",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), 1, "a/b; disk quota"),
        (MemoryError(), 1, "lower batch_size or seq_len"),
        (
            RuntimeError("INTERNAL: Error dispatching computation: Out of memory"),
            1,
            "lower batch_size or seq_len",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "nobody reads it"),
    ],
)
def test_what_the_system_refuses_needs_no_traceback(
    err, code, words, monkeypatch, capsys
):
    assert ends(monkeypatch, failing(err), "config") == code
    said = capsys.readouterr().err
    assert said.startswith("scaletrain: ")
    assert words in said


@pytest.mark.parametrize(
    "err",
    [
        ConnectionResetError(errno.ECONNRESET, "x"),
        RuntimeError("a bug"),
        RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"),
    ],
)
def test_a_programmer_error_keeps_its_traceback(err, monkeypatch):
    with pytest.raises(type(err)):
        ends(monkeypatch, failing(err), "config")


def test_memory_that_is_too_small_comes_with_what_to_lower():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.numpy.zeros((2**46,)).block_until_ready()
    told = failures.explained(caught.value, config.RunConfig(seq_len=100_000))
    assert told is not None
    assert told.exit_code == 1
    assert "seq_len=100000" in str(told)
    assert str(caught.value) in str(told)
    assert "lower batch_size or seq_len" in str(told)


@pytest.mark.parametrize(
    ("name", "option", "code"),
    [("plan", "--topology=v5e:2x2", 130), ("bench", "--sweep", 0)],
)
def test_sigterm_keeps_what_is_known_as_an_interrupt_does(
    name, option, code, monkeypatch, capsys
):
    def known(run, args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            return Result({}, "known by then", name == "plan")
        return Result({}, "not interrupted")

    assert ends(monkeypatch, known, name, option) == code
    assert capsys.readouterr().out == "known by then\n"


def test_help_names_defaults_and_every_exit_code():
    words = scaletrain("generate", "--help").stdout
    for default in ("128", "0.8", "0", "1.0"):
        assert f"(default: {default})" in words
    assert "130 or 143 ended at once by a signal" in words


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


def test_help_and_refusals_come_without_jax():
    """Which takes seconds to import; the launch scripts ask on machines without it."""
    code = (
        "import sys, scaletrain.main, scaletrain.preflight\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
