"""Holds import, eval, generate and export to what transformers computes.

    parity.py --torch=PYTHON [--seed=N] [--family=NAME ...]

Every family's model has random shapes, weights and tokens, drawn anew each time.
PYTHON has torch and transformers; this runs under the project's own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import secrets
import struct
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
TOLERANCE = 1e-4
EXACT = "--config.precision.compute=float32"


@dataclasses.dataclass
class Result:
    """What became of one family; a NaN compares as failed."""

    logits: float = float("nan")
    greedy: bool = False
    exported: bool = False
    reloaded: float = float("nan")
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        close = self.logits <= TOLERANCE and self.reloaded <= TOLERANCE
        return close and self.greedy and self.exported and not self.error


class Failed(Exception):
    """A command that did not exit with 0."""


def main() -> None:
    """Prints a table of the families and exits 1 if one of them fails."""
    args = _arguments()
    print(f"--seed={args.seed}")
    families = args.family or json.loads(_torch(args.torch, "make.py", "--list"))
    print(f"{'family':10} {'logits':>8} {'greedy':>6} {'export':>6} {'reloaded':>8}")
    results = []
    for family in families:
        with tempfile.TemporaryDirectory() as path:
            results.append(_check(family, args, pathlib.Path(path)))
        print(_row(family, results[-1]), flush=True)
    sys.exit(not all(result.passed for result in results))


def _arguments() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="a Python with transformers")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--family", action="append", help="default: all; may repeat")
    return parser.parse_args()


def _row(family: str, result: Result) -> str:
    """Returns a family's line of the table, and below it what went wrong."""
    words = {True: "equal", False: "FAIL"}
    line = (
        f"{family:10} {result.logits:8.1e} {words[result.greedy]:>6} "
        f"{words[result.exported]:>6} {result.reloaded:8.1e}"
    )
    if not result.passed:
        line += "  FAILED"
    return "\n    ".join([line, *result.error.splitlines()])


def _check(family: str, args: argparse.Namespace, path: pathlib.Path) -> Result:
    """Takes one model through every command, up to the first that fails."""
    result = Result()
    given, workdir, back = path / "given", f"--workdir={path / 'run'}", path / "back"
    try:
        drawn = [f"--family={family}", "--seed", str(args.seed)]
        _torch(args.torch, "make.py", *drawn, "--to", str(given))
        reference = np.load(given / "reference.npz")
        _scaletrain("import", f"--from={given}", workdir)
        result.logits = _logits(reference, workdir, path)
        result.greedy = _greedy(reference, workdir)
        _scaletrain("export", workdir, f"--to={back}")
        result.exported = _tensors(given) == _tensors(back)
        npz = str(given / "reference.npz")
        record = _torch(args.torch, "compare.py", str(back), npz, "--strict")
        result.reloaded = json.loads(record)["max_abs_diff"]
    except Failed as err:
        result.error = str(err)
    return result


def _logits(reference: Any, workdir: str, path: pathlib.Path) -> float:
    """Returns the largest difference of `scaletrain eval` at a real position."""
    tokens, saved = path / "tokens.npy", path / "logits.npy"
    np.save(tokens, reference["tokens"])
    _scaletrain("eval", workdir, EXACT, f"--tokens={tokens}", f"--save_logits={saved}")
    found, expected = np.load(saved), reference["logits"]
    if found.shape != expected.shape or found.dtype != np.float32:
        raise Failed(f"eval wrote {found.dtype}{list(found.shape)}")
    real = np.arange(expected.shape[1]) < reference["lengths"][:, None]
    return float(np.abs(found - expected)[real].max())


def _greedy(reference: Any, workdir: str) -> bool:
    """Returns whether `scaletrain generate` picks the same tokens."""
    prompt = ",".join(map(str, reference["prompt"]))
    expected = reference["greedy"].tolist()
    words = ["--temperature=0", f"--max_new_tokens={len(expected)}", "--json"]
    printed = _scaletrain("generate", workdir, EXACT, f"--prompt_ids={prompt}", *words)
    return [record["ids"] for record in json.loads(printed)] == [expected]


def _tensors(path: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Returns the dtype, shape and bytes of every tensor in a directory's files."""
    found = {}
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], body[start:end])
    return found


def _torch(python: str, script: str, *args: str) -> str:
    """Returns what a script of this folder prints under the other Python."""
    return _run([python, str(HERE / script), *args])


def _scaletrain(*args: str) -> str:
    """Returns what scaletrain's command line prints."""
    return _run([sys.executable, "-m", "scaletrain.main", *args])


def _run(command: list[str]) -> str:
    """Returns a command's output.

    Raises:
      Failed: with the end of its messages, if it does not exit with 0.
    """
    env = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stdout + done.stderr).splitlines()[-8:]
        raise Failed("\n".join([f"exit {done.returncode}: {' '.join(command)}", *tail]))
    return done.stdout


if __name__ == "__main__":
    main()
