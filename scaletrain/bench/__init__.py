"""The speed of the step of `train` on the present devices, and its distance from ideal.

command     the request and its record   shapes      matmuls and attention of a device
measure     the timed steps              microbench  the seconds of one operation
profile     seconds by kernel and scope  sweep       the search for the fastest settings
roofline    the speed of the hardware    report      the record as text
"""

from scaletrain.bench.command import benchmark, request
from scaletrain.bench.report import in_words

__all__ = ["benchmark", "in_words", "request"]
