"""Goodput: the share of a run's wall time that moved it forward, over all attempts.

`attempts.json` in the workdir has an entry for each attempt. An attempt that is killed
cannot say goodbye, so its entry is written again whenever a step is logged.
"""

import json
import pathlib
import time
from typing import Any

import jax

from scaletrain.phases import STEP, Phases


class Account:
    """What became of the time of a run's attempts."""

    def __init__(self, workdir: pathlib.Path, phases: Phases):
        self._path, self._phases = workdir / "attempts.json", phases
        self._attempts = self._read()
        # Time of day: only the gaps between attempts are measured with it.
        began = time.time() - phases.elapsed()
        self._attempts.append({"began": began, "from": 0, "to": 0})

    def _read(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []  # a lost account is no reason not to train

    def begin(self, step: int) -> None:
        """Says which step this attempt goes on from, or went back to."""
        self.update(step, first=step)

    def update(self, step: int, first: int | None = None) -> None:
        """Writes what is known after `step`."""
        now = self._attempts[-1]
        if first is not None:
            # What was done beyond the step it went back to is done again.
            now["again"] = now.get("again", 0) + max(0, now["to"] - first)
            now["from"] = min(now["from"] or first, first)
        now |= {
            "to": step,
            "seconds": self._phases.elapsed(),
            "phases": self._phases.totals(),
        }
        if jax.process_index() == 0:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._attempts, indent=1), encoding="utf-8")
            partial.replace(self._path)

    def total(self) -> dict[str, Any]:
        """Returns the seconds of the run by cause; productive is what is not lost."""
        causes: dict[str, float] = {}
        for i, attempt in enumerate(self._attempts):
            after = self._attempts[i + 1] if i + 1 < len(self._attempts) else None
            for name, seconds in attempt.get("phases", {}).items():
                causes[name] = causes.get(name, 0.0) + seconds
            lost = _lost_s(attempt, after)
            causes[STEP] = causes.get(STEP, 0.0) - lost
            causes["lost"] = causes.get("lost", 0.0) + lost
            if after is not None:
                ended = attempt["began"] + attempt.get("seconds", 0.0)
                causes["down"] = causes.get("down", 0.0) + max(
                    0.0, after["began"] - ended
                )
        whole = sum(causes.values())
        return {
            "goodput": causes[STEP] / whole if whole else 0.0,
            "attempts": len(self._attempts),
            "seconds": whole,
            "seconds_by_cause": causes,
        }


def _lost_s(attempt: dict[str, Any], after: dict[str, Any] | None) -> float:
    """Returns the seconds of an attempt's steps that were taken again."""
    steps = attempt["to"] - attempt["from"] + attempt.get("again", 0)
    again = attempt.get("again", 0)
    if after is not None:
        again += max(0, attempt["to"] - after["from"])
    if not steps:
        return 0.0
    return attempt.get("phases", {}).get(STEP, 0.0) * min(1.0, again / steps)


def in_words(total: dict[str, Any]) -> str:
    """Returns one line: goodput, and what took the rest."""
    rest = {
        name: seconds / total["seconds"]
        for name, seconds in total["seconds_by_cause"].items()
        if name != STEP and total["seconds"]
    }
    told = ", ".join(
        f"{name} {share:.1%}"
        for name, share in sorted(rest.items(), key=lambda item: -item[1])
        if share >= 0.0005
    )
    starts = "1 attempt" if total["attempts"] == 1 else f"{total['attempts']} attempts"
    return (
        f"goodput {total['goodput']:.1%} of {total['seconds']:,.0f} s in {starts}"
        f"{': ' if told else ''}{told}"
    )
