"""The observers of a run: each measures or records it, and none changes its result.

    recorder     the records of its steps, on disk and on the terminal
    meter        the numbers that a record gets from the devices
    phase_clock  the seconds a run spends in each of its phases
    attempt      the entries of attempts.json
    goodput      the share of the wall time that moved the run forward
    watchdog     the end of a process that hangs
    tensorboard  the event files that TensorBoard reads

An observer that cannot write, on a full disk, ends no run.
"""
