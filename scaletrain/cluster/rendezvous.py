"""How the processes of a run find each other: they all come to process 0."""

import os
import socket
import time

from scaletrain.cluster.connection import Link, Message
from scaletrain.cluster.discovery import Membership
from scaletrain.errors import ClusterError, LostError

_HELLO_S = 5.0  # for a connection to say who it is
_RETRY_S = 0.5
_BUSY_S = 30.0  # for the port of a process 0 that is ending to become free
_LOOPBACK = ("127.0.0.1", "localhost")


def meet(place: Membership, wait_s: float) -> tuple[list[str], list[Link]]:
    """Returns the hosts of all processes, in order, and this one's links to others.

    Process 0 has a link to each, they have one to it.

    Raises:
      ClusterError: two processes claim one number, or differ in how many there are.
      LostError: not all came within `wait_s`; it names who did not.
    """
    host, _, port = place.coordinator.rpartition(":")
    host, deadline = host.strip("[]"), time.monotonic() + wait_s
    if place.process_id:
        return _come(place, (host, int(port)), deadline, wait_s)
    return _receive(place, host, int(port), deadline, wait_s)


def _receive(
    place: Membership, host: str, port: int, deadline: float, wait_s: float
) -> tuple[list[str], list[Link]]:
    here, links = {0: _here()}, dict[int, Link]()
    with _listener(place, host, port) as listener:
        while len(here) < place.num_processes:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link = Link(listener.accept()[0])
            except TimeoutError:
                raise _missing(place, links, wait_s) from None
            _admit(place, link, here, links)
    names = [here[i] for i in range(place.num_processes)]
    for link in links.values():
        link.send({"names": names})
    return names, list(links.values())


def _listener(place: Membership, host: str, port: int) -> socket.socket:
    """Returns a socket that listens at the coordinator's port."""
    deadline = time.monotonic() + _BUSY_S
    everywhere = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    if host in _LOOPBACK:
        address, how = "127.0.0.1", {}
    elif socket.has_dualstack_ipv6():
        address, how = "", everywhere
    else:
        address, how = "", {}
    while True:
        try:
            return socket.create_server(
                (address, port), backlog=place.num_processes, **how
            )
        except OSError as err:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"coordinator={place.coordinator}; process 0 cannot listen there "
                    f"({err.strerror}); give another port."
                ) from err
        time.sleep(_RETRY_S)


def _admit(
    place: Membership, link: Link, here: dict[int, str], links: dict[int, Link]
) -> None:
    """Takes in a process that says who it is, in place of one that is gone."""
    hello = link.first(time.monotonic() + _HELLO_S)
    peer, count = hello.get("process"), hello.get("of")
    if not (isinstance(peer, int) and isinstance(count, int) and "here" in hello):
        link.close()  # whoever that was
        return
    problem = ""
    if count != place.num_processes or not 0 < peer < count:
        problem = (
            f"process 0 on {here[0]} has {place.num_processes} processes, "
            f"process {peer} on {hello['here']} has {count}"
        )
    elif peer in links and not links[peer].closed():
        problem = (
            f"both {here[peer]} and {hello['here']} say that they are process {peer}"
        )
    if problem:
        error = ClusterError(f"{problem}; start all of them with the same command.")
        _part([link, *links.values()], {"refused": str(error)})
        raise error
    if peer in links:
        links[peer].close()
    link.peer, links[peer], here[peer] = peer, link, hello["here"]


def _missing(place: Membership, links: dict[int, Link], wait_s: float) -> LostError:
    missing = [i for i in range(1, place.num_processes) if i not in links]
    listed = ", ".join(map(str, missing[:20])) + (", ..." if missing[20:] else "")
    error = LostError(
        f"{len(missing)} of {place.num_processes} processes did not come to "
        f"{place.coordinator} within {wait_s:g} s: {listed}; start all of them again."
    )
    _part(list(links.values()), {"missing": str(error)})
    return error


def _part(links: list[Link], last: Message) -> None:
    for link in links:
        link.send(last)
        link.close()


def _come(
    place: Membership, address: tuple[str, int], deadline: float, wait_s: float
) -> tuple[list[str], list[Link]]:
    hello = {"process": place.process_id, "of": place.num_processes, "here": _here()}
    why = ""
    while time.monotonic() < deadline:
        try:
            link = Link(socket.create_connection(address, timeout=_HELLO_S))
        except OSError as err:
            why = err.strerror or str(err)
            time.sleep(_RETRY_S)
            continue
        link.send(hello)
        # Process 0 gives up first, and says of whom.
        answer = link.first(deadline + _HELLO_S)
        if "names" in answer:
            return answer["names"], [link]
        link.close()
        if "refused" in answer:
            raise ClusterError(answer["refused"])
        if "missing" in answer:
            raise LostError(answer["missing"])
        why = "it does not answer"
        time.sleep(_RETRY_S)
    raise LostError(
        f"process 0 was not found at {place.coordinator} within {wait_s:g} s ({why}); "
        "start all of them again."
    )


def _here() -> str:
    return f"{socket.gethostname()} (pid {os.getpid()})"
