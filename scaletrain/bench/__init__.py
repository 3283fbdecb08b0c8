"""How fast the step of `train` is on the devices that are here, and how near ideal.

command   the request and the run    roofline       what the hardware can do, measured
timing    the timed steps            shapes, loops  of what it measures, and how
profile   where the time went        sweep          settings against each other
report    a bench in words
"""

from scaletrain.bench.command import request, run
from scaletrain.bench.report import in_words

__all__ = ["in_words", "request", "run"]
