"""Where the time of a step went: a trace of the profiler, read kernel by kernel.

A kernel is known by its instruction in the compiled step, whose metadata says which
scope of the model it stems from. Kernels of a device may overlap, collectives above
all, so that sums can exceed the step's time. A fusion across scopes counts for one.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from scaletrain import compilation, hlo
from scaletrain.bench.measure import Steps

STEPS = 3  # that are traced
_LARGEST = 12  # kernels that are listed
SCOPES = ("attention", "mlp", "head", "embedding", "optimizer")
_IN_SCOPE = re.compile(rf"(?<![\w'])({'|'.join(SCOPES)})(?![\w'])")
_MATMULS = ("dot", "convolution", "scaled-dot", "ragged-dot")
_MOVES = {
    "copy", "copy-start", "copy-done", "transpose", "slice", "dynamic-slice",
    "dynamic-update-slice", "concatenate", "pad", "reshape", "broadcast", "bitcast",
    "parameter", "constant", "tuple", "get-tuple-element", "iota", "reverse", "convert",
}  # fmt: skip
_LOOPS = ("while", "call", "conditional")  # their time is that of what they run
_DEVICE = re.compile(r"/device:[GT]PU:\d+")
_DEVICE_LINE = re.compile(r"XLA Ops$|Stream")  # of a TPU, of a GPU
# Kernels whose instruction is not known, and custom calls: by words of their name.
_WORDS = (
    ("attention", r"fmha|sdpa|flash|attention|splash"),
    ("collective", r"nccl|all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter"),
    ("matmul", r"gemm|matmul|cutlass|nvjet|xmma|\bdot\b"),
    ("copy", r"memcpy|memset|copy|transpose"),
    (
        "element-wise fusion",
        r"fusion|loop_|input_|wrapped_|add_norm|cross_entropy|rotary",
    ),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One execution on one device."""

    device: str
    name: str  # of its instruction, or its own where that is not told
    seconds: float


def of(steps: Steps, workdir: str) -> dict[str, Any]:
    """Returns where the time of a few steps went; leaves their trace in a folder."""
    folder = workdir or tempfile.mkdtemp(prefix="scaletrain-bench-")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # thousands of events that are not looked at
    if jax.default_backend() == "gpu":
        # A command buffer is one event, whatever it holds.
        one_by_one = {"xla_gpu_enable_command_buffer": ""}
        steps.compiled = compilation.compiled(steps.program, one_by_one)
    with jax.profiler.trace(folder, profiler_options=options):
        steps.take(STEPS)
    files = pathlib.Path(folder).glob("**/*.xplane.pb")
    newest = max(files, key=lambda path: path.stat().st_mtime)
    data = jax.profiler.ProfileData.from_file(str(newest))
    module = hlo.parse(steps.compiled.as_text())
    found = summed(kernels(data), module, STEPS)
    planes = [plane.name for plane in data.planes]
    return {"trace": str(newest), "planes": planes, **found}


def kernels(data: Any) -> Iterator[Kernel]:
    """Yields what ran on the devices of a trace; on the host where CPUs are those."""
    # The host of a GPU tells of the same instructions when it launches them.
    planes = [plane for plane in data.planes if _DEVICE.match(plane.name)]
    for plane in planes or data.planes:
        for line in plane.lines:
            if planes and not _DEVICE_LINE.match(line.name):
                continue  # other lines tell the same time again
            for event in line.events:
                with warnings.catch_warnings():  # of how its type was made, once
                    warnings.simplefilter("ignore", DeprecationWarning)
                    stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is None and planes:
                    # A TPU's event is named by the text of its instruction.
                    text = re.match(r"%([\w.\-]+) ", event.name)
                    name = text[1] if text else event.name
                if name is not None:
                    device = f"{plane.name} {stats.get('device_ordinal', '')}".strip()
                    yield Kernel(device, str(name), event.duration_ns * 1e-9)


def summed(found: Iterable[Kernel], module: hlo.Module, steps: int) -> dict[str, Any]:
    """Returns seconds a step of a device: by class, by scope and class, the largest."""
    instructions: dict[str, hlo.Instruction] = {}
    for computation in module.computations.values():
        for each in computation.instructions:
            instructions[each.name] = each
            # A kernel's own name has no dots.
            instructions.setdefault(re.sub(r"[.\-]", "_", each.name), each)
    times: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    devices = set()
    for kernel in found:
        each = instructions.get(kernel.name)
        if each is None or each.opcode not in _LOOPS:
            scope = scope_of(each, module) if each else "other"
            what = class_of(each, module) if each else class_of_name(kernel.name)
            devices.add(kernel.device)
            times[scope, what, kernel.name] += kernel.seconds
    share = 1 / (steps * max(1, len(devices)))
    by_class: dict[str, float] = collections.defaultdict(float)
    by_scope: dict[str, dict[str, float]] = {}
    for (scope, what, _), seconds in times.items():
        by_class[what] += seconds * share
        inner = by_scope.setdefault(scope, {})
        inner[what] = inner.get(what, 0.0) + seconds * share
    largest = sorted(times.items(), key=lambda item: -item[1])[:_LARGEST]
    return {
        "devices": sorted(devices),
        "by_class": dict(sorted(by_class.items(), key=lambda item: -item[1])),
        "by_scope": {scope: by_scope[scope] for scope in (*SCOPES, "other")
                     if scope in by_scope},
        "largest": [
            {"name": name, "class": what, "scope": scope, "seconds": seconds * share}
            for (scope, what, name), seconds in largest
        ],
    }  # fmt: skip


def scope_of(each: hlo.Instruction, module: hlo.Module) -> str:
    """Returns the outermost named scope an instruction stems from."""
    inner = each.called("calls")
    paths = [each.op_name]
    if inner in module.computations:
        paths += [part.op_name for part in module.computations[inner].instructions]
    for path in paths:
        if found := _IN_SCOPE.search(path):
            return found[1]
    return "other"


def class_of(each: hlo.Instruction, module: hlo.Module) -> str:
    """Returns the kind of kernel an instruction becomes."""
    base = re.sub(r"-(start|done)$", "", each.opcode)
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if base in hlo.COLLECTIVES:
        return "collective"
    if each.opcode == "custom-call":
        found = class_of_name(target[1] if target else "")
        if found != "other":
            return found
        # A kernel of our own has its compiler's name there, and its own in the scope.
        own = re.sub(r"/(pallas_call|mpmd_map)$", "", each.op_name)
        return class_of_name(own.rpartition("/")[2])
    inner = module.computations.get(each.called("calls") or "")
    opcodes = {part.opcode for part in inner.instructions} if inner else {each.opcode}
    if opcodes & set(_MATMULS):
        return "matmul"
    if opcodes & set(hlo.COLLECTIVES):
        return "collective"
    if opcodes <= _MOVES:
        return "copy"
    return "element-wise fusion" if inner else "other"


def class_of_name(words: str) -> str:
    """Returns the kind of a kernel of which only a name is known."""
    for what, pattern in _WORDS:
        if re.search(pattern, words, re.IGNORECASE):
            return what
    return "other"
