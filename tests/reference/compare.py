"""Compares what transformers computes from a directory with stored logits.

    compare.py DIR NPZ [--strict]

Prints the largest absolute difference at a real position as JSON. With --strict the
directory must hold the model's weights, no more, no fewer, or the exit status is 1.
Run it with a Python that has torch and transformers.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import families
import numpy as np
import torch


def main() -> None:
    """Prints how far apart the logits are, and what --strict found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("npz", type=pathlib.Path)
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args()
    model, loading = families.load(args.dir, output_loading_info=True)
    record: dict[str, Any] = {"max_abs_diff": difference(model, args.npz)}
    wrong = {k: sorted(map(str, v)) for k, v in loading.items() if v}
    if args.strict:
        record |= wrong
    print(json.dumps(record))
    sys.exit(bool(args.strict and wrong))


def difference(model: torch.nn.Module, npz: pathlib.Path) -> float:
    """Returns the largest difference from the `logits` for the stored `tokens`.

    Rows are as long as `lengths` says, or whole where it is not stored.
    """
    stored = np.load(npz)
    tokens, expected = stored["tokens"], stored["logits"]
    lengths = stored.get("lengths", np.full(len(tokens), tokens.shape[1]))
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    found = families.logits(model, tokens, lengths)
    return float(np.abs(found - expected)[real].max())


if __name__ == "__main__":
    main()
