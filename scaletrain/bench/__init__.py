"""How fast the step of `train` is on the devices that are here, and how near ideal.

command   the request and the run     roofline  what the hardware can do, measured
timing    the timed steps             sweep     settings tried against each other
profile   where the time went         report    a bench in words
"""

from scaletrain.bench.command import request, run
from scaletrain.bench.report import in_words

__all__ = ["in_words", "request", "run"]
