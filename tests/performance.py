"""The step's speed on the GPU that is here; writes docs/performance.md.

    python tests/performance.py

Each row is `scaletrain bench` of one experiment in a process of its own, with the
overrides that the table shows.
"""

import concurrent.futures
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENT = "experiments/llama_1b.py:synthetic"
SMALL = (
    "model.num_layers=12", "model.d_model=768", "model.num_heads=12",
    "model.num_kv_heads=12", "model.d_ff=2048", "model.vocab_size=50304",
    "seq_len=1024", "batch_size=64",
)  # fmt: skip
MIDDLE = (
    "model.num_layers=24", "model.d_model=1024", "model.num_heads=16",
    "model.num_kv_heads=16", "model.d_ff=4096", "seq_len=2048", "batch_size=24",
)  # fmt: skip
LARGE = ("batch_size=8",)
NAMES = "residual,query,key,value,attention,mlp_gate,mlp_up"
SAVED = ("model.remat=save", f"model.remat_save={NAMES}")
PACKED = ("data.source=stdlib", "data.tokenizer=bytes")
ROWS = (
    ("1.1B, T 4096, heads of 64", LARGE),
    ("heads of 128", (*LARGE, "model.num_heads=16", "model.num_kv_heads=4",
                      "model.d_head=128")),
    ("scanned layers, saved by name", (*LARGE, *SAVED, "model.layers=scan")),
    ("everything recomputed", (*LARGE, "model.remat=full")),
    ("packed documents, real pipeline", (*LARGE, *PACKED)),
    ("Muon", (*LARGE, "optim.name=muon")),
    ("350M, T 2048", MIDDLE),
    ("124M, T 1024", SMALL),
)  # fmt: skip


TOPOLOGIES = {
    "NVIDIA A100-SXM4-80GB": "a100:1", "NVIDIA H100 80GB HBM3": "h100:1",
    "NVIDIA H200": "h200:1", "NVIDIA B200": "b200:1",
}  # fmt: skip


def measured(overrides):
    """Returns what bench says of the experiment with `overrides`, or why nothing."""
    data = ["--data"] if overrides[-len(PACKED) :] == PACKED else []
    return told(["bench", "--steps=10", *data], overrides)


def planned(kind, overrides):
    """Returns what plan says of the same step, with the CUDA compiler alone."""
    return told(["plan", f"--topology={TOPOLOGIES[kind]}"], overrides)


def told(command, overrides):
    """Returns the JSON of a command, or why there is none."""
    words = [sys.executable, "-m", "scaletrain.main", *command, "--json"]
    words += [f"--config={EXPERIMENT}", "--config.accumulate_steps=1"]
    words += [f"--config.{each}" for each in overrides]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no word"])[-1]
    return json.loads(done.stdout), ""


def main():
    """Measures every row and writes the table."""
    rows = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for name, overrides in ROWS:
            found, why = measured(overrides)
            # Planned on the host's cores while the next row is measured.
            kind = found["device"]["kind"] if found else ""
            plan = pool.submit(planned, kind, overrides) if found else None
            rows.append((name, overrides, found, plan))
            print(name, why or f"{found['mfu']:.1%}", flush=True)
    lines, first, sources = [], None, set()
    for name, overrides, found, future in rows:
        if found is None or future is None:
            lines.append(f"| {name} | failed | | | | | | | |")
            continue
        first = first or found
        plan, why = future.result()
        assert plan is not None, why
        sources.add(plan["source"])
        speed = plan["tokens_per_s_per_chip"] / found["tokens_per_s_per_device"]
        memory = plan["hbm_peak_bytes"] / found["peak_memory_bytes"]
        wait = f", data wait {found['data_wait']:.2%}" if "data_wait" in found else ""
        lines.append(
            f"| {name} | {found['tokens_per_s_per_device']:,.0f} | "
            f"{found['mfu']:.1%} | {found['achieved_over_ideal']:.2f} | "
            f"{found['peak_memory_bytes'] / 1e9:.1f} | "
            f"{found['compile_time_s']:.0f} s | {1 / speed - 1:+.0%} | "
            f"{memory - 1:+.0%} | `{' '.join(overrides)}`{wait} |"
        )
    assert first is not None, lines
    device = first["device"]
    text = f"""# Speed of the step

Made by `make performance` on one {device["kind"]} with jax {device["jax"]}, from
`{EXPERIMENT}` with `accumulate_steps=1` and the overrides of each row. `mfu` counts
causal attention and what is not recomputed, against {first["peak_flops"] / 1e12:.0f}
TFLOP/s; "ideal" is the time of the step's matmuls, attention and optimizer alone, each
measured in the same process. The last two figures are how far the step time and the
memory of `scaletrain plan` ({", ".join(sorted(sources))}) are from these.

| row | tokens/s | mfu | of ideal | GB | compile | plan s | plan GB | overrides |
|---|---|---|---|---|---|---|---|---|
""" + "\n".join(lines)
    (ROOT / "docs" / "performance.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
