"""A run that is killed at random moments ends as the one that nobody touched.

    make endurance N=50            # SEED=... repeats the choice of phases and signals

A small run is ended with SIGKILL or SIGTERM in its start, restore, compile, steps,
saves and evaluations, and started again, as often as asked. At its end,
parameters, optimizer state, key, step and losses are compared with those of a run in
one piece: to the last bit, or to 1e-5 where attempts had other meshes. Then the next
such run begins.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import small
from absl import logging

from scaletrain import config
from scaletrain.config import DataConfig, MeshConfig, RunConfig

ROOT = pathlib.Path(__file__).parent.parent
PHASES = ("start", "restore", "compile", "step", "save", "eval")
MESHES = (MeshConfig(), MeshConfig(fsdp=2), MeshConfig(data=2, tensor=2))
CLOSE = 1e-5  # between meshes: of losses, and of a leaf's norm
_LIMIT_S = 120.0  # for an attempt to reach a phase, or its end
_KILLS = 12  # of one run, if it does not end before


def run_of(folder: pathlib.Path, texts: pathlib.Path) -> RunConfig:
    """Returns the run: real text, float32, saves and evaluations every few steps."""
    return small.changed(
        small.RUN,
        num_steps=60,
        log_every_steps=1,
        eval_every_steps=8,
        model__vocab_size=272,
        optim__learning_rate=1e-3,
        checkpoint__every_steps=5,
        eval__num_batches=2,
        data=DataConfig(
            source="files",
            path=str(texts / "*.py"),
            validation_fraction=0.2,
            cache_dir=str(folder / "cache"),
        ),
    )


@dataclasses.dataclass
class Attempt:
    """A process that trains."""

    workdir: pathlib.Path
    mesh: MeshConfig

    def __enter__(self) -> "Attempt":
        folder = self.workdir.parent
        run = small.changed(run_of(folder, folder.parent / "texts"), mesh=self.mesh)
        settings = folder / "run.json"
        settings.write_text(config.to_json(run))
        words = [f"--config={settings}", f"--workdir={self.workdir}"]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(config.mesh_size(self.mesh)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        self.said = (folder / "said.txt").open("w+", encoding="utf-8")
        self.before = self.step()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scaletrain.main", "train", *words],
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            env=env,
        )
        return self

    def __exit__(self, *why: object) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()

    def step(self) -> int:
        """Returns the last step that was told of."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return json.loads(line)["step"]
            except ValueError:  # half a line
                continue
        return 0

    def phase(self) -> str:
        """Returns what the process says it is doing; "start" until it says so."""
        try:
            status = json.loads((self.workdir / "status.json").read_text())
        except (FileNotFoundError, ValueError):
            return "start"
        if status["pid"] != self.process.pid:
            return "start"
        # The first state is made where later attempts read it.
        return "restore" if status["phase"] == "init" else status["phase"]

    def reach(self, phase: str, rng: random.Random) -> bool:
        """Waits for a moment inside `phase`; returns whether it came."""
        start_s, further = rng.uniform(0.2, 5.0), rng.randint(1, 9)
        deadline = time.monotonic() + _LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if phase == "start":
                time.sleep(start_s)
                return self.process.poll() is None and self.phase() == "start"
            if phase == "step":
                # Steps before the last kill may be told of until they are taken again.
                ready = self.phase() not in ("start", "restore", "compile")
                if ready and self.step() != self.before:
                    time.sleep(further * 0.02)
                    return self.process.poll() is None
            elif self.phase() == phase:
                inside_s = {"restore": 0.3, "compile": 1.0, "save": 0.1, "eval": 0.1}
                time.sleep(rng.uniform(0.0, inside_s[phase]))
                return self.process.poll() is None
            time.sleep(0.001)
        return False

    def end(self, number: signal.Signals) -> int:
        """Sends the signal; returns the exit code, which has to be one of its own."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=_LIMIT_S)
        # Python has SIGTERM's default until `main` has begun.
        allowed = {signal.SIGKILL: (-9,), signal.SIGTERM: (75, 0, -15)}[number]
        assert code in allowed, f"exit code {code} after {number.name}\n{self.words()}"
        return code

    def finish(self) -> None:
        """Waits for the end of the run."""
        code = self.process.wait(timeout=5 * _LIMIT_S)
        assert code == 0, f"exit code {code}\n{self.words()}"

    def words(self) -> str:
        """Returns the end of what the process said."""
        self.said.seek(0)
        return self.said.read()[-3000:]


def outcome(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns what the last checkpoint holds by path, every loss and evaluation."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    told = list(map(json.loads, lines))
    records = [record for record in told if "loss" in record]
    # The last one is done anew by whoever finds no step left.
    evaluated = {r["step"]: r["eval_loss"] for r in told if "eval_loss" in r}
    found = {"losses": np.array([record["loss"] for record in records])}
    found["hashes"] = np.array([record["batch_hash"] for record in records])
    found["evaluated steps"] = np.array(list(evaluated))
    found["evaluations"] = np.array(list(evaluated.values()))
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    found["last step"] = np.array(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("params", "rest"):
            folder = workdir / "checkpoints" / str(step) / item
            stored = reader.metadata(folder).item_metadata
            stored = dict(getattr(stored, "tree", stored))
            plain = {k: ocp.RestoreArgs(restore_type=np.ndarray) for k in stored}
            args = ocp.args.PyTreeRestore(restore_args=plain)
            leaves = reader.restore(folder, args=args)
            found |= {f"{item}/{k}": np.asarray(v) for k, v in leaves.items()}
    return found


def compare(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], *, exact: bool
) -> float:
    """Returns the greatest relative difference; raises where it is too great."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    worst = 0.0
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        if exact or not np.issubdtype(value.dtype, np.floating):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            continue
        whole = np.isfinite(value)  # limits of spikes that are not known yet are not
        np.testing.assert_array_equal(found[name][~whole], value[~whole], err_msg=name)
        size = float(np.linalg.norm(value[whole])) or 1.0
        apart = float(np.linalg.norm(found[name][whole] - value[whole])) / size
        assert apart <= CLOSE, f"{name}: {apart:.2g} of its norm apart"
        worst = max(worst, apart)
    return worst


def kills(
    count: int, rng: random.Random, folder: pathlib.Path
) -> Iterator[tuple[str, str, int]]:
    """Yields (phase, signal, step) of `count` kills; what they leave was compared."""
    texts = _made(folder / "texts")  # of its own: an edited file is another corpus
    for path in (ROOT / "tests").glob("test_[m-s]*.py"):
        shutil.copy(path, texts)
    workdir = _made(folder / "straight") / "run"
    with Attempt(workdir, MESHES[1]) as straight:
        straight.finish()
    wanted = outcome(workdir)
    queue: list[str] = []
    for number in range(count):  # at most one run a kill
        moved, done = number % 2 == 1, 0
        workdir = _made(folder / str(number)) / "run"
        meshes = MESHES if moved else MESHES[1:2]
        most, over = min(count, _KILLS), False
        while not over and done < most:
            queue = queue or rng.sample(PHASES, len(PHASES))
            phase = queue.pop()
            with Attempt(workdir, rng.choice(meshes)) as attempt:
                if not attempt.reach(phase, rng):
                    over = attempt.process.poll() is not None
                    if over:
                        attempt.finish()
                    else:  # the moment has passed: another attempt, as after a kill
                        queue.insert(0, phase)
                    continue
                sent = rng.choice((signal.SIGKILL, signal.SIGTERM))
                over = attempt.end(sent) == 0
                done, count = done + 1, count - 1
                yield phase, sent.name, attempt.step()
        if not over:
            with Attempt(workdir, rng.choice(meshes)) as attempt:
                attempt.finish()
        worst = compare(outcome(workdir), wanted, exact=not moved)
        how = f"within {worst:.1g}, meshes changed" if moved else "to the last bit"
        print(f"run {number}: {done} kills, as in one piece {how}", flush=True)
        if count <= 0:
            return


def _made(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv: list[str] | None = None) -> collections.Counter[tuple[str, str]]:
    """Kills as often as asked; prints how often it hit which phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.FATAL)  # Orbax misses what only its manager writes
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"{args.n} kills, SEED={seed}", flush=True)
    began = time.monotonic()
    table: Any = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for phase, sent, step in kills(
            args.n, random.Random(seed), pathlib.Path(folder)
        ):
            table[phase, sent] += 1
            spent = time.monotonic() - began
            print(f"  {spent:4.0f} s: {sent} in {phase}, step {step}", flush=True)
    for phase in PHASES:
        counts = [f"{sent} {table[phase, sent]:3}" for sent in ("SIGKILL", "SIGTERM")]
        print(f"{phase:8} {'   '.join(counts)}")
    return table


if __name__ == "__main__":
    main()
