"""What a process is answered about its run, with and without other processes."""

import argparse

from scaletrain.cluster import processes


class LoggedPeers:
    """The processes of a run as one of them knows them; logs what it gathers."""

    def __init__(self, names, process_id, log):
        self.names, self.process_id, self.log = names, process_id, log

    def gather(self, name, value):
        """Returns this process's value as that of all."""
        self.log.append(name)
        return [value] * len(self.names)


def test_processes_work_in_turns_one_of_a_host_first(monkeypatch):
    names = ["a (pid 1)", "b (pid 1)", "a (pid 2)", "b (pid 2)"]
    turns = []
    for i in range(4):
        log = []
        monkeypatch.setattr(processes, "_peers", LoggedPeers(names, i, log))
        made = processes.in_turns(lambda log=log: log.append("work") or "made")
        assert made == "made"
        assert log.count("turn") == 3
        turns.append(log.index("work"))
    assert turns == [0, 1, 2, 2]


def test_process_0_decides(monkeypatch):
    answers = {True: [str(True), str(False)], False: [str(False), str(True)]}
    for first, values in answers.items():
        peers = argparse.Namespace(gather=lambda name, value, values=values: values)
        monkeypatch.setattr(processes, "_peers", peers)
        assert processes.decide("save", not first) is first


def test_a_process_alone_asks_nobody():
    assert processes.decide("save", True)
    assert not processes.decide("save", False)
    assert processes.gather("name", "value") == ["value"]
    assert processes.in_turns(lambda: "made") == "made"
    assert processes.lead()
