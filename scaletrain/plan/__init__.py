"""Memory, time and cost of a run on devices that are not here.

slices    what can be asked for          compiler  the step, compiled for it
search    layouts worth compiling        worker    the compiler's own process
estimate  the same, by hand              memory, timing  reading its report
cost      money, energy, carbon          record    the plan under its keys
launch    the command to run             report    the plan in words
"""
