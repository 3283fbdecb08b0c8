"""Makes reference models and what transformers computes with them.

    make.py                                     the committed fixtures
    make.py --family=NAME --seed=N --to=DIR     one model of random shapes
    make.py --list                              the families' names, as JSON

Run it with a Python that has torch and transformers.
"""

import argparse
import json
import pathlib
import shutil

import families
import numpy as np

HERE = pathlib.Path(__file__).parent
BFLOAT16 = {"llama", "mistral", "qwen2", "gemma2", "gemma3"}
SHARDED = "qwen3"


def main() -> None:
    """Makes what the command line asks for."""
    args = _arguments()
    if args.list:
        print(json.dumps(list(families.FAMILIES)))
    elif args.family:
        rng = np.random.default_rng(args.seed)
        make(args.family, families.Shape.draw(rng), rng, args.to)
    else:
        for number, family in enumerate(families.FAMILIES):
            fixture(family, np.random.default_rng(number))


def _arguments() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--family", choices=families.FAMILIES)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--to", type=pathlib.Path)
    return parser.parse_args()


def fixture(family: str, rng: np.random.Generator) -> None:
    """Writes one family's committed files afresh."""
    dtype = "bfloat16" if family in BFLOAT16 else "float32"
    shape = families.Shape(dtype=dtype)
    path = HERE / family
    shutil.rmtree(path, ignore_errors=True)
    make(family, shape, rng, path)
    if family == "llama3":
        found = families.gradients(families.load(path), shape.vocab, rng)
        np.savez_compressed(path / "gradients.npz", **found)
    if family == SHARDED:
        _shard(path, HERE / f"{family}_sharded")


def make(
    family: str, shape: families.Shape, rng: np.random.Generator, path: pathlib.Path
) -> None:
    """Saves a random model and, beside it, what it computes in float32."""
    greedy: dict[str, np.ndarray] = {}
    while not greedy:
        families.build(family, shape, rng).save_pretrained(path)
        model = families.load(path)
        greedy = families.continuation(model, shape.vocab, rng)
    given = families.batch(shape.vocab, rng)
    logits = families.logits(model, **given)
    np.savez_compressed(path / "reference.npz", logits=logits, **given, **greedy)


def _shard(path: pathlib.Path, to: pathlib.Path) -> None:
    """Saves the model of `path` again in two files and an index."""
    shutil.rmtree(to, ignore_errors=True)
    size = (path / "model.safetensors").stat().st_size
    families.load(path).save_pretrained(to, max_shard_size=size * 6 // 10)


if __name__ == "__main__":
    main()
