"""An attempt at a run: one start of its process, as an entry of attempts.json."""

import dataclasses
import json
from typing import Any

from scaletrain.workdir import Workdir

_KEYS = {"first": "from", "last": "to"}  # field -> key of the file, where they differ
_NUMBER = (int, float)


@dataclasses.dataclass
class Attempt:
    """The steps that an attempt took and the seconds of each of its phases."""

    began: float  # time of day, in seconds
    # The same on the monotonic clock, which does not jump while the machine is up.
    up: float
    boot: str  # the machine's boot id: `up` compares within one; "" = not known
    first: int | None = None  # the earliest step it went on from
    last: int | None = None  # the step it is at
    taken: int = 0  # number of steps, those taken again included
    finished: bool = False  # no step was left: the time after it is not downtime
    phases: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds
    seconds: float = 0.0  # of all phases

    def entry(self) -> dict[str, Any]:
        """Returns the entry of attempts.json."""
        fields = dataclasses.asdict(self)
        return {_KEYS.get(name, name): value for name, value in fields.items()}

    @classmethod
    def of(cls, entry: Any) -> "Attempt | None":
        """Returns the attempt of an entry, None where the entry is not valid."""
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            entry = {"finished": False, **entry}  # older ones do not say
            attempt = cls(**{name: entry[_KEYS.get(name, name)] for name in names})
            return attempt if attempt._is_sound() else None
        except (KeyError, TypeError, AttributeError):
            return None

    def _is_sound(self) -> bool:
        numbers = (self.began, self.up, self.seconds, *self.phases.values())
        steps = (self.first, self.last)
        began = all(isinstance(step, int) for step in steps)
        return (
            all(isinstance(number, _NUMBER) for number in numbers)
            and isinstance(self.boot, str)
            and isinstance(self.taken, int)
            and (began or (steps == (None, None) and not self.taken))
        )


def attempts(workdir: Workdir) -> list[Attempt]:
    """Returns the attempts in a workdir, oldest first; empty if the file is lost."""
    try:
        entries = json.loads(workdir.attempts.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []  # a lost account is no reason not to train
    known = map(Attempt.of, entries if isinstance(entries, list) else [])
    return [attempt for attempt in known if attempt is not None]
