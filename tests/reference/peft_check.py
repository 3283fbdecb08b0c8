"""Compares what peft computes from a base and an adapter with stored logits.

    peft_check.py BASE_DIR ADAPTER_DIR NPZ

Prints as JSON the largest absolute differences from the stored logits: the adapter's
(`max_abs_diff`) and the base's alone (`without_adapter`, so 0 says that the adapter
does nothing). The exit status is 1 if the adapter's file holds other names than peft
expects: it passes over those it does not know.
Run it with a Python that has torch, transformers and peft.
"""

import argparse
import json
import pathlib
import sys

import compare
import families
import peft


def main() -> None:
    """Prints how far apart the logits are, and the names peft did not use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=pathlib.Path)
    parser.add_argument("adapter", type=pathlib.Path)
    parser.add_argument("npz", type=pathlib.Path)
    args = parser.parse_args()
    base = families.load(args.base)
    without = compare.difference(base, args.npz)
    model = peft.PeftModel.from_pretrained(base, args.adapter)
    names = set(peft.load_peft_weights(str(args.adapter), device="cpu"))
    wanted = set(peft.get_peft_model_state_dict(model))
    record = {
        "max_abs_diff": compare.difference(model, args.npz),
        "without_adapter": without,
        "unexpected": sorted(names - wanted),
        "missing": sorted(wanted - names),
    }
    print(json.dumps(record))
    sys.exit(names != wanted)


if __name__ == "__main__":
    main()
