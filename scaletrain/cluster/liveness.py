"""The other processes of a run: they are heard, and the one that is lost is named.

Process 0 holds a link to each of the others. A thread in every process says something
every fifth of `heartbeat_s` and listens. Who has not been heard for that long, or
whose link closes before a goodbye, is lost; then nobody can go on, since every
collective waits for it. Each process says who it was and ends with the code that means
"start me again", from the thread: its main thread may be inside a collective for good.
Time in which the thread itself did not run, on a machine that was paused, is nobody's
silence.
"""

import collections
import json
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Mapping

from scaletrain.cluster.connection import Link, Message
from scaletrain.errors import ClusterError, LostError

_BEATS = 5  # in the time after which silence means that a process is lost
WHY_S = 1.0  # for the news that a process is lost to overtake what it broke here
_OWN_WORDS_S = 5.0  # for a process to fail by itself of what another failed of
_LAST_S = 2.0  # for the others to end before process 0, which serves them


def end(line: str, code: int) -> None:
    """Ends this process here and now, whatever its other threads are doing."""
    if line:
        print(f"scaletrain: {line}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


class Peers:
    """The processes of this run, as this one knows them."""

    def __init__(
        self,
        process_id: int,
        names: list[str],
        links: list[Link],
        heartbeat_s: float,
        end: Callable[[str, int], None] = end,
    ):
        self.process_id, self.names = process_id, names  # such as "node1 (pid 7)"
        self._links, self._heartbeat_s, self._end = links, heartbeat_s, end
        self._changed = threading.Condition()
        self._said: dict[str, dict[int, str]] = {}  # process 0: what has come so far
        self._gathered: dict[str, list[str]] = {}
        self._counts = collections.Counter[str]()
        self._failed: tuple[float, str, int] | None = None  # when to end, why, code
        self._over = False
        self._looked = time.monotonic()  # when the thread last ran
        for link in links:
            link.heard = self._looked
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def gather(self, name: str, value: str) -> list[str]:
        """Returns what each process says under `name`, in order, once all have.

        All processes gather each name as often, from any thread. However long the
        slowest takes, the others wait; if one is lost they end.
        """
        with self._changed:
            self._counts[name] += 1
            key = f"{self._counts[name]} {name}"
        if self.process_id:
            self._tell({"say": key, "value": value})
        else:
            self._collect(key, 0, value)
        with self._changed:
            self._changed.wait_for(lambda: key in self._gathered)
            return self._gathered.pop(key)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Compares what must be the same in all processes, by name.

        Raises:
          ClusterError: in every process, with all that differ from process 0.
        """
        mine = {name: str(value) for name, value in facts.items()}
        first = json.loads(
            self.gather("facts", json.dumps(mine) if self.process_id == 0 else "")[0]
        )
        found = [
            f"{name} is {mine.get(name)}, in process 0 {first.get(name)}"
            for name in first | mine
            if mine.get(name) != first.get(name)
        ]
        answers = self.gather("differences", json.dumps(found))
        problems = [
            f"  process {self._name(i)}: {line}"
            for i, answer in enumerate(answers)
            for line in json.loads(answer)
        ]
        if problems:
            listed = "\n".join(problems[:20])
            raise ClusterError(
                f"the processes do not agree:\n{listed}\n"
                "start all of them with the same command, code and data."
            )

    def leave(self, code: int) -> None:
        """Says goodbye and, with a code other than 0, ends this process with it.

        Then the others end too, since this one will take part in nothing any more. An
        ordinary end would wait for them as they wait for this process.
        """
        if code == 0:
            self.gather("end", "")
        elif code != LostError.exit_code:
            time.sleep(WHY_S)
        self._tell({"bye": code})
        if code:
            self._over = True
            self._await_others(self._patience(code) + _LAST_S)
            self._end("", code)

    def _patience(self, code: int) -> float:
        """Returns how long the others have to end by themselves: a save may be long."""
        return self._heartbeat_s if code == LostError.exit_code else _OWN_WORDS_S

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link, selectors.EVENT_READ)
            next_beat = time.monotonic()
            while not self._over:
                if time.monotonic() >= next_beat:
                    self._tell({})
                    next_beat = time.monotonic() + self._heartbeat_s / _BEATS
                wait = self._until(next_beat) - time.monotonic()
                # The second look is for what came while this process was stopped.
                ready = selector.select(max(wait, 0.0)) or selector.select(0)
                for key, _ in ready:
                    if not self._listen(key.fileobj):  # pyright: ignore
                        selector.unregister(key.fileobj)
                self._judge()

    def _until(self, next_beat: float) -> float:
        """Returns when there is something to do, if nothing comes before."""
        silent = [k.heard + self._heartbeat_s for k in self._links if not k.left]
        return min([next_beat, *silent, *(self._failed or ())[:1]])

    def _listen(self, link: Link) -> bool:
        """Hears what has come over `link`; returns whether more can."""
        messages = link.receive()
        for message in messages or ():
            self._hear(link, message)
        if messages is not None:
            return True
        self._links = [other for other in self._links if other is not link]
        if not (link.left or self._over or self._failed):
            self._lost(link, "ended without a word")
        return False

    def _hear(self, link: Link, message: Message) -> None:
        if "say" in message:
            self._collect(message["say"], link.peer, message["value"])
        elif "gathered" in message:
            self._settle(message["gathered"], message["values"])
        elif "lost" in message:
            self._stop(message["lost"], LostError.exit_code)
        elif "failed" in message:
            self._fail(message["failed"], message["code"])
        elif "bye" in message:
            link.left = True
            if code := message["bye"]:
                line = f"process {self._name(link.peer)} ended with exit code {code}."
                self._tell({"failed": line, "code": code})
                self._fail(line, code)

    def _judge(self) -> None:
        now = time.monotonic()
        late_s = now - self._looked - self._heartbeat_s / _BEATS
        self._looked = now
        if late_s > 0:
            for link in self._links:  # whose ends may have been paused as well
                link.heard = min(now, link.heard + late_s)
        if self._failed:
            if now >= self._failed[0]:
                self._stop(*self._failed[1:])
            return
        for link in self._links:
            if not link.left and now - link.heard >= self._heartbeat_s:
                self._lost(link, f"has not been heard for {self._heartbeat_s:g} s")

    def _lost(self, link: Link, how: str) -> None:
        line = (
            f"process {self._name(link.peer)} {how}; the others cannot go on without "
            "it; start all of them again."
        )
        self._links = [other for other in self._links if other is not link]
        self._tell({"lost": line})
        self._stop(line, LostError.exit_code)

    def _fail(self, line: str, code: int) -> None:
        """Ends this process soon, unless it fails of the same by itself."""
        when = time.monotonic() + self._patience(code)
        self._failed = self._failed or (when, line, code)

    def _stop(self, line: str, code: int) -> None:
        if not self._over:
            self._over = True
            self._await_others(_LAST_S)
            self._end(line, code)

    def _await_others(self, seconds: float) -> None:
        """Lets the others end before process 0, of whose end jax would make a crash."""
        deadline = time.monotonic() + seconds
        while self.process_id == 0 and time.monotonic() < deadline:
            if all(link.closed() for link in self._links):
                break
            time.sleep(0.02)

    def _tell(self, message: Message) -> None:
        for link in self._links:
            link.send(message)

    def _collect(self, key: str, peer: int, value: str) -> None:
        """Takes one process's word at process 0; passes them on once all are there."""
        with self._changed:
            said = self._said.setdefault(key, {})
            said[peer] = value
            if len(said) < len(self.names):
                return
        values = [said[i] for i in range(len(self.names))]
        self._tell({"gathered": key, "values": values})
        self._settle(key, values)

    def _settle(self, key: str, values: list[str]) -> None:
        with self._changed:
            self._said.pop(key, None)
            self._gathered[key] = values
            self._changed.notify_all()

    def _name(self, peer: int) -> str:
        return f"{peer} on {self.names[peer]}"
