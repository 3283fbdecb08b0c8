"""Memory, time and cost of a run on devices that this machine does not have.

search    layouts worth compiling      compiler        the step, compiled for a slice
estimate  the analytic estimate        compile_worker  the process of one compilation
record    the plan, and its command    memory          bytes in the compiler's dump
report    the text of the plan         schedule        the step's time by the dump
progress  the bar of a search          costs           the time of one operation
"""
