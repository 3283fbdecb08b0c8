"""Goodput: the share of a run's wall time that moved it forward, over all attempts.

`attempts.json` in the workdir has an entry for each attempt. An attempt that is killed
cannot write a last time, so its entry is written every few seconds; its lost steps show
once a later attempt goes on from an earlier step.
"""

import contextlib
import json
import math
import pathlib
import threading
import time
from typing import Any, Self

import jax

from scaletrain.files import atomic_write
from scaletrain.monitor.attempt import Attempt, attempts
from scaletrain.monitor.phase_clock import STEP, Phases
from scaletrain.workdir import Workdir

_EVERY_S = 2.0
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")  # of Linux


class Account:
    """The account of a run's time by attempt and phase, kept on disk inside a `with`.

    A start that is refused, or that has nothing to do, is not an attempt.
    """

    def __init__(self, workdir: Workdir, phases: Phases):
        self._path, self._phases = workdir.attempts, phases
        self._over, self._writing = threading.Event(), threading.Lock()
        self._attempts, elapsed = attempts(workdir), phases.elapsed()
        self._now = Attempt(
            began=time.time() - elapsed,
            up=time.monotonic() - elapsed,
            boot=_BOOT.read_text().strip() if _BOOT.exists() else "",
        )
        self._attempts.append(self._now)
        self._measure()

    def __enter__(self) -> Self:
        """Starts to write."""
        if jax.process_index() == 0:
            self._write()
            threading.Thread(target=self._keep, name="goodput", daemon=True).start()
        return self

    def __exit__(self, *why: object) -> None:
        """Writes for the last time."""
        self._over.set()
        if jax.process_index() == 0:
            self._write()

    def begin(self, step: int) -> None:
        """Sets the step that this attempt goes on from, or rolls back to."""
        now, first = self._now, self._now.first
        now.first = step if first is None else min(first, step)
        now.last = step

    def took(self, step: int) -> None:
        """Counts a step that was taken."""
        self._now.last = step
        self._now.taken += 1

    def finish(self) -> None:
        """Marks the run as complete: the time until it is extended is no downtime."""
        self._now.finished = True

    def _measure(self) -> None:
        self._now.phases = self._phases.totals()
        self._now.seconds = sum(self._now.phases.values())

    def _keep(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._write()

    def _write(self) -> None:
        with self._writing, contextlib.suppress(OSError):  # no reason not to train
            self._measure()
            entries = [attempt.entry() for attempt in self._attempts]
            atomic_write(self._path, json.dumps(entries, indent=1).encode())

    def total(self) -> dict[str, Any]:
        """Returns goodput and the seconds of the run by cause, over all attempts."""
        self._measure()
        causes = {STEP: 0.0, "lost": 0.0}
        later: Attempt | None = None
        begun_again = math.inf  # the earliest step that a later attempt took again
        for attempt in reversed(self._attempts):
            for name, seconds in attempt.phases.items():
                causes[name] = causes.get(name, 0.0) + seconds
            lost = _lost_s(attempt, begun_again)
            causes[STEP] -= lost
            causes["lost"] += lost
            if later is not None and not attempt.finished:
                causes["down"] = causes.get("down", 0.0) + _between_s(attempt, later)
            later = attempt
            if attempt.first is not None:
                begun_again = min(begun_again, attempt.first)
        wall_s = sum(causes.values())
        return {
            "goodput": causes[STEP] / wall_s if wall_s else 0.0,
            "attempts": len(self._attempts),
            "seconds": wall_s,
            "seconds_by_cause": causes,
        }


def _lost_s(attempt: Attempt, begun_again: float) -> float:
    """Returns the seconds of an attempt's steps that were taken again, or not ended."""
    in_steps, taken = attempt.phases.get(STEP, 0.0), attempt.taken
    if attempt.first is None or attempt.last is None or not taken:
        return in_steps
    kept = min(attempt.last, begun_again) - attempt.first
    return in_steps * (1.0 - max(0.0, kept) / taken)


def _between_s(attempt: Attempt, later: Attempt) -> float:
    """Returns the seconds from an attempt's last entry to the start of the next."""
    same_boot = attempt.boot and attempt.boot == later.boot
    # The time of day may jump; the monotonic clock starts anew with each boot.
    since = later.up - attempt.up if same_boot else later.began - attempt.began
    return max(0.0, since - attempt.seconds)


def in_words(total: dict[str, Any]) -> str:
    """Returns a line of goodput and the shares of the other causes."""
    rest = {
        name: seconds / total["seconds"]
        for name, seconds in total["seconds_by_cause"].items()
        if name != STEP and total["seconds"]
    }
    causes = ", ".join(
        f"{name} {share:.1%}"
        for name, share in sorted(rest.items(), key=lambda item: -item[1])
        if share >= 0.0005
    )
    starts = "1 attempt" if total["attempts"] == 1 else f"{total['attempts']} attempts"
    return (
        f"goodput {total['goodput']:.1%} of {total['seconds']:,.0f} s in {starts}"
        f"{': ' if causes else ''}{causes}"
    )
