"""Memory, time and cost of a run on devices that are not here.

search    layouts worth compiling        compiler  the step, compiled for a slice
estimate  the same, by hand              worker    the compiler's own process
record    the plan under its keys        memory, timing  reading its report
report    the plan in words              launch    the command to run
"""
