"""Memory, time and cost of a run on devices that are not here.

slices    what can be asked for          compiler  the step, compiled for it
search    layouts worth compiling        worker    the compiler's own process
estimate  the same, by hand              hlo, memory, timing  reading its report
cost      money, energy, carbon          report    the plan in words
"""
