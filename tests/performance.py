"""The step's speed on the GPUs that are here; writes docs/performance.md.

    python tests/performance.py [--rows=1b,muon] [--results=DIR] [--table]

Each row is `scaletrain bench` (or `train`) of one experiment in a process of its own,
with the overrides that the table shows. What it finds lies in DIR, docs/performance, a
file a row, so that several calls make one table; `--table` makes it without measuring.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

from scaletrain.hardware.chips import by_kind

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENT = "experiments/llama_1b.py:synthetic"
LOW = "precision.gradients=bfloat16"  # as those of the peers
LARGE = ("accumulate_steps=1", "batch_size=8", LOW)
PARTS = ("accumulate_steps=4", "batch_size=32", LOW)
HEADS = ("model.num_heads=16", "model.num_kv_heads=4", "model.d_head=128")
SMALL = (
    "accumulate_steps=1", "model.num_layers=12", "model.d_model=768",
    "model.num_heads=12", "model.num_kv_heads=12", "model.d_ff=2048",
    "model.vocab_size=50304", "seq_len=1024", "batch_size=64",
)  # fmt: skip
MIDDLE = (
    "accumulate_steps=1", "model.num_layers=24", "model.d_model=1024",
    "model.num_heads=16", "model.num_kv_heads=16", "model.d_ff=4096", "seq_len=2048",
    "batch_size=24",
)  # fmt: skip
NAMES = "residual,query,key,value,attention,mlp_gate,mlp_up"
PACKED = (*LARGE, "data.source=stdlib", "data.tokenizer=bytes")
SAVES, STEPS = 50, 150  # of the row that trains


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    overrides: tuple[str, ...]
    base: str = ""  # the row whose speed it is divided by
    peer: str = ""  # the best of other systems, measured on an H100 (bf16 MFU, causal)
    how: str = "bench"  # or "data": with the settings' own; or "train"
    devices: int = 1


ROWS = {
    "1b": Row("1.1B, T 4096, heads of 64", LARGE, peer="71,304 (transformers)"),
    "1bh128": Row("heads of 128", (*LARGE, *HEADS), "1b"),
    "fp8": Row(
        "fp8, scales of the moment", (*LARGE, "precision.matmul=fp8"), "1b",
        "81,003 (torchtitan)",
    ),
    "fp8delayed": Row(
        "fp8, scales of the last steps",
        (*LARGE, "precision.matmul=fp8", "precision.scaling=delayed"),
        "1b",
    ),
    "accumulate": Row("4 parts of 8 sequences", PARTS, "1b"),
    "muon": Row("Muon", (*LARGE, "optim.name=muon"), "1b"),
    "muon4": Row(
        "Muon, 4 parts of 8 sequences", (*PARTS, "optim.name=muon"), "accumulate"
    ),
    "scan": Row(
        "scanned layers, saved by name",
        (*LARGE, "model.remat=save", f"model.remat_save={NAMES}", "model.layers=scan"),
        "1b",
        "57,928 (MaxText)",
    ),
    "full": Row("everything recomputed", (*LARGE, "model.remat=full"), "1b"),
    "packed": Row("packed documents, real pipeline", PACKED, "1b", how="data"),
    "train": Row(
        "`train` on them, a checkpoint every 50 steps", PACKED, "1b", how="train"
    ),
    "350m": Row("350M, T 2048", MIDDLE, peer="mfu 40.5% (transformers)"),
    "124m": Row("124M, T 1024", SMALL, peer="485,000 (nanoGPT)"),
    "fsdp2": Row(
        "two GPUs, FSDP",
        ("accumulate_steps=1", "batch_size=16", LOW, "mesh.data=1", "mesh.fsdp=2"),
        "1b",
        devices=2,
    ),
}  # fmt: skip


def told(words, row):
    """Returns the output of a command, or why there is none."""
    visible = ",".join(map(str, range(row.devices)))
    line = [sys.executable, "-m", "scaletrain.main", *words, f"--config={EXPERIMENT}"]
    line += [f"--config.{each}" for each in row.overrides]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(
        line, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no word"])[-1]
    return done.stdout, ""


def measured(row):
    """Returns what bench says of a row, or why nothing."""
    data = ["--data"] if row.how == "data" else []
    out, why = told(["bench", "--json", "--steps=10", *data], row)
    return (json.loads(out), "") if out else (None, why)


def trained(row, like):
    """Returns the record of `like` with the speed of a run that saves checkpoints.

    The mean of its steps after the first ten, with the time its saves hold it up.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="scaletrain-performance-"))
    cadence = (
        f"num_steps={STEPS}", "optim.warmup_steps=0", "log_every_steps=10",
        "eval_every_steps=0", "eval.num_batches=1", "checkpoint.keep_every_steps=0",
        f"checkpoint.every_steps={SAVES}", "checkpoint.keep=1",
    )  # fmt: skip
    run = dataclasses.replace(row, overrides=(*row.overrides, *cadence))
    _, why = told(["train", f"--workdir={folder}/run"], run)
    if why:
        return None, why
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    settings = json.loads((folder / "run" / "config.json").read_text())
    shutil.rmtree(folder)
    records = [json.loads(line) for line in lines]
    times = [r["step_time_s"] for r in records if r.get("step_time_s")][1:]
    slower = statistics.fmean(times) / like["step_time_s"]
    return like | {
        "step_time_s": like["step_time_s"] * slower,
        "tokens_per_s_per_device": like["tokens_per_s_per_device"] / slower,
        "mfu": like["mfu"] and like["mfu"] / slower,
        "achieved_over_ideal": like["achieved_over_ideal"] / slower,
        "config": settings,
    }, ""


def planned(row, found):
    """Returns what plan says of the same step, with the CUDA compiler alone."""
    topology = f"{by_kind(found['device']['kind']).generation}:{row.devices}"
    out, why = told(["plan", "--json", f"--topology={topology}"], row)
    return json.loads(out) if out else {"problem": why}


def measure(keys, folder):
    """Measures rows one after another; plans each while the next is measured."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for key in sorted(keys, key=list(ROWS).index):
            row = ROWS[key]
            like = known(folder).get(row.base)
            if row.how == "train":
                found, why = (
                    trained(row, like["found"])
                    if like
                    else (None, f"measure {row.base} first")
                )
            else:
                found, why = measured(row)
            if found is None:
                print(key, why, flush=True)
                continue
            print(key, f"{found['tokens_per_s_per_device']:,.0f}", flush=True)
            today = datetime.date.today().isoformat()
            # Cards differ by 1%: what a row is divided by is of the same call.
            base = like and like["found"]["tokens_per_s_per_device"]
            result = {"found": found, "date": today, "plan": {}, "base": base}
            write(folder, key, result)
            if row.how != "train":
                pool.submit(_plan_later, folder, key, result)


def _plan_later(folder, key, result):
    write(folder, key, result | {"plan": planned(ROWS[key], result["found"])})


def write(folder, key, result):
    part = folder / f"{key}.part"
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(folder / f"{key}.json")  # whole, whenever it is read


def known(folder):
    """Returns the results that lie in a folder, in the order of the table."""
    paths = {key: folder / f"{key}.json" for key in ROWS}
    return {
        key: json.loads(path.read_text(encoding="utf-8"))
        for key, path in paths.items()
        if path.is_file()
    }


def cells(key, results):
    """Returns the cells of a row."""
    row, found, plan = ROWS[key], results[key]["found"], results[key]["plan"]
    speed, ratio = found["tokens_per_s_per_device"], ""
    if base := results[key]["base"]:
        ratio = f"{speed / base:.3f} of `{row.base}`"
    off = ["", ""]
    if plan.get("tokens_per_s_per_chip"):
        off = [
            f"{speed / plan['tokens_per_s_per_chip'] - 1:+.0%}",
            f"{plan['hbm_peak_bytes'] / found['peak_memory_bytes'] - 1:+.0%}",
        ]
    overrides = " ".join(each for each in row.overrides if held(each, found))
    wait = f", data wait {found['data_wait']:.2%}" if "data_wait" in found else ""
    return [
        f"`{key}`", row.name, f"{speed:,.0f}", f"{found['mfu']:.1%}", ratio, row.peer,
        f"{found['achieved_over_ideal']:.2f}", f"{found['step_time_spread']:.1%}",
        f"{found['peak_memory_bytes'] / 1e9:.1f}", f"{found['compile_time_s']:.0f} s",
        *off, f"`{overrides}`{wait}",
    ]  # fmt: skip


def held(override, found):
    """Returns whether a row was measured with an override that it has today."""
    path, _, wanted = override.partition("=")
    value = functools.reduce(
        lambda v, k: v.get(k, {}), path.split("."), found["config"]
    )
    return wanted == (",".join(value) if isinstance(value, list) else str(value))


def table(results):
    """Returns docs/performance.md."""
    first = next(iter(results.values()))
    found, dates = first["found"], sorted({each["date"] for each in results.values()})
    kinds = sorted({each["found"]["device"]["kind"] for each in results.values()})
    heads = [
        "row", "", "tokens/s a GPU", "mfu", "speed", "best peer", "of ideal", "spread",
        "GB", "compile", "plan s", "plan GB", "overrides",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads), *(cells(key, results) for key in results)]
    return f"""# Speed of the step

Made by `make performance` on {", ".join(kinds)} with jax {found["device"]["jax"]}
({", ".join(dates)}), from `{EXPERIMENT}` with the overrides of each row. `mfu` counts
causal attention and what is not recomputed, against {found["peak_flops"] / 1e12:.0f}
TFLOP/s of bf16. "speed" is tokens/s a GPU over another row's; "best peer" is tokens/s
of the fastest other system that was run on an H100 at this shape. "of ideal" is the
time of the step's matmuls, attention and optimizer alone, each measured in the same
process, over the step's; "spread" is from the 10th to the 90th percentile over the
median. "plan" is how far `scaletrain plan` is from the step's time and memory. `train`
has its speed from a run's records, and the rest from `1b`. Cards differ by 1%: a speed
is divided by one of the same card. The best setting of transformers for `1b` is bf16
weights with float32 masters and cuDNN attention: 71,304 tokens/s, so that `1b` is 1.07
times as fast; with autocast it reaches 69,386, 1.10.

""" + "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *limits(results)])


def limits(results):
    """Returns what keeps the step from being faster, by what bench found."""
    if not {"1b", "1bh128", "muon"} <= results.keys():
        return
    whole, wide, muon = (results[key]["found"] for key in ("1b", "1bh128", "muon"))
    ms = {name[:-2]: 1e3 * its for name, its in whole["roofline"]["ideal"].items()}
    step = 1e3 * whole["step_time_s"]
    more = muon["roofline"]["optimizer_s"] - whole["roofline"]["optimizer_s"]
    yield f"""
## What holds it back

Of the {step:.0f} ms of `1b`, its matmuls alone take {ms["gemms"]:.0f}, its attention
{ms["attention"]:.0f}, its optimizer {ms["optimizer"]:.0f}; in the other
{step - ms["step"]:.0f} attention is slower than alone, and memory is read and written:
for norms, residuals, rotary positions and copies.

- By a profile of 423 ms matmuls take 289, attention 100, and all that is
  element-wise 32, most of it near the memory's speed: norms 11, the optimizer 11,
  positions 4, the loss 2, copies of weights 3.
  Cross-entropy that overwrites its logits makes 118.0 of 122.0 ms of `124m`, one kernel
  for heads and their positions 117.4 of 118.1 ms; of `1b` the first changes nothing,
  the second 0.2%.
- SwiGLU inside its matmuls: 424.1 instead of 430.2 ms of `1b` on one card, and 455.3
  instead of 473.2 ms of `scan`. Those matmuls reach 671 TFLOP/s forward and 528
  backward, where the vendor's, without an epilogue, reach 730 to 770 in the same step's
  profile and about 700 alone: 10 to 13 ms of it.
- `1b` reached {whole["achieved_over_ideal"]:.3f} of its ideal here, and 0.895 on
  another card in the same minutes, in the same time: its matmuls alone were faster.
- The card's power seems to be the limit of the matmuls: one after another they draw
  all of its 700 W. Gradients in bfloat16 save 6.6 GB of traffic, 0.5% of the step at
  the memory's speed, and made it 0.2% faster.
- Ten sequences instead of eight: 1.2% more tokens/s, in 70 GB.
- Attention: {speed_of(whole):.0f} TFLOP/s with heads of 64, {speed_of(wide):.0f}
  with heads of 128.
- Muon: {1e3 * more:.0f} ms more than AdamW a step, however many parts it has: a tenth
  of a step of 8 sequences, 3% of one of 32. They are matmuls, as fast as others.
- Scanned layers copy what their loops read and write. `scan` took 473.2 instead of
  481.5 ms when those no longer filled it with zeros first.
- On 2026-11-28 `train` shared its host with rows of another GPU; alone it was 0.994
  before. Row `124m` was not measured then; 15 of its steps, timed as bench does, took
  117.4 ms each: 558,000 tokens/s, mfu 45%."""


def speed_of(found):
    """Returns the TFLOP/s of attention, forward and backward."""
    kinds = found["roofline"]["attention"]
    kinds = kinds if isinstance(kinds, list) else list(kinds.values())
    return kinds[0]["flops"] / 1e12


def main():
    """Measures what is asked for and writes the table of all that is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    one = [key for key, row in ROWS.items() if row.devices == 1]
    parser.add_argument("--rows", default=",".join(one), help="of " + ",".join(ROWS))
    parser.add_argument("--results", default=str(ROOT / "docs" / "performance"))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    folder = pathlib.Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    keys = args.rows.split(",")
    if unknown := set(keys) - ROWS.keys():
        parser.error(f"--rows={','.join(sorted(unknown))}; pick from {','.join(ROWS)}")
    if not args.table:
        measure(keys, folder)
    if results := known(folder):
        path = ROOT / "docs" / "performance.md"
        path.write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
