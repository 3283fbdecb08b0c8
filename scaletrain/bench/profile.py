"""The seconds of a step by kernel, class and scope, from a trace of the profiler.

A kernel is identified by its instruction in the compiled step; the metadata of the
instruction names its scope in the model. Kernels of a device can overlap, collectives
above all, so that sums can exceed the time of the step. A fusion of several scopes
counts for only one of them.
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

STEPS = 3  # number of traced steps
_LARGEST = 12  # number of kernels in the list of the longest
SCOPES = ("attention", "mlp", "head", "embedding", "optimizer")
_IN_SCOPE = re.compile(rf"(?<![\w'])({'|'.join(SCOPES)})(?![\w'])")
_MATMULS = ("dot", "convolution", "scaled-dot", "ragged-dot")
_MOVES = {
    "copy", "copy-start", "copy-done", "transpose", "slice", "dynamic-slice",
    "dynamic-update-slice", "concatenate", "pad", "reshape", "broadcast", "bitcast",
    "parameter", "constant", "tuple", "get-tuple-element", "iota", "reverse", "convert",
}  # fmt: skip
# Their time is the sum of the kernels that they run, and would count twice.
_LOOPS = ("while", "call", "conditional")
_DEVICE = re.compile(r"/device:[GT]PU:\d+")
_DEVICE_LINE = re.compile(r"XLA Ops$|Stream")  # of a TPU, of a GPU
# For custom calls and kernels whose instruction is not known: class, pattern of names.
_NAME_PATTERNS = (
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
    """One execution of a kernel on one device."""

    device: str
    name: str  # of its instruction; the kernel's own where the trace has no instruction
    seconds: float


def of(steps: Steps, workdir: str) -> dict[str, Any]:
    """Returns the profile of `STEPS` steps; writes their trace to a folder.

    Args:
      steps: taken further by `STEPS` steps; on a GPU they are compiled again.
      workdir: folder of the trace; "" = a temporary one.
    """
    folder = workdir or tempfile.mkdtemp(prefix="scaletrain-bench-")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # avoids thousands of events that nothing reads
    if jax.default_backend() == "gpu":
        # A command buffer is one event in the trace, however many kernels it has.
        no_buffers = {"xla_gpu_enable_command_buffer": ""}
        steps.compiled = compilation.compiled(steps.program, no_buffers)
    with jax.profiler.trace(folder, profiler_options=options):
        steps.take(STEPS)
    files = pathlib.Path(folder).glob("**/*.xplane.pb")
    newest = max(files, key=lambda path: path.stat().st_mtime)
    data = jax.profiler.ProfileData.from_file(str(newest))
    module = hlo.parse(steps.compiled.as_text())
    times = summed(kernels(data), module, STEPS)
    planes = [plane.name for plane in data.planes]
    return {"trace": str(newest), "planes": planes, **times}


def kernels(data: Any) -> Iterator[Kernel]:
    """Yields the kernels of a trace: of the devices, or of the host if these are CPUs.

    Args:
      data: a `jax.profiler.ProfileData`.
    """
    # The host of a GPU has events with the same names, one for each launch.
    planes = [plane for plane in data.planes if _DEVICE.match(plane.name)]
    for plane in planes or data.planes:
        for line in plane.lines:
            if planes and not _DEVICE_LINE.match(line.name):
                continue  # other lines, such as steps and modules, repeat the time
            for event in line.events:
                with warnings.catch_warnings():
                    # The first use warns of the way in which jaxlib made the type.
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


def summed(
    executions: Iterable[Kernel], module: hlo.Module, steps: int
) -> dict[str, Any]:
    """Returns the seconds of a step by class, by scope and class, and by kernel.

    Seconds are means over devices and steps. Only the longest kernels are listed.

    Args:
      executions: all kernels of a trace.
      module: the compiled step.
      steps: number of steps in the trace.
    """
    instructions: dict[str, hlo.Instruction] = {}
    for computation in module.computations.values():
        for each in computation.instructions:
            instructions[each.name] = each
            # Where a trace has the kernel's own name, "_" replaces dots and hyphens.
            instructions.setdefault(re.sub(r"[.\-]", "_", each.name), each)
    times: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    devices = set()
    for kernel in executions:
        each = instructions.get(kernel.name)
        if each is None or each.opcode not in _LOOPS:
            scope = scope_of(each, module) if each else "other"
            kind = class_of(each, module) if each else class_of_name(kernel.name)
            devices.add(kernel.device)
            times[scope, kind, kernel.name] += kernel.seconds
    factor = 1 / (steps * max(1, len(devices)))
    by_class: dict[str, float] = collections.defaultdict(float)
    by_scope: dict[str, dict[str, float]] = {}
    for (scope, kind, _), seconds in times.items():
        by_class[kind] += seconds * factor
        inner = by_scope.setdefault(scope, {})
        inner[kind] = inner.get(kind, 0.0) + seconds * factor
    largest = sorted(times.items(), key=lambda item: -item[1])[:_LARGEST]
    return {
        "devices": sorted(devices),
        "by_class": dict(sorted(by_class.items(), key=lambda item: -item[1])),
        "by_scope": {scope: by_scope[scope] for scope in (*SCOPES, "other")
                     if scope in by_scope},
        "largest": [
            {"name": name, "class": kind, "scope": scope, "seconds": seconds * factor}
            for (scope, kind, name), seconds in largest
        ],
    }  # fmt: skip


def scope_of(each: hlo.Instruction, module: hlo.Module) -> str:
    """Returns the outermost scope of `SCOPES` that has an instruction, or "other"."""
    inner = each.called("calls")
    paths = [each.op_name]
    if inner in module.computations:
        paths += [one.op_name for one in module.computations[inner].instructions]
    for path in paths:
        if match := _IN_SCOPE.search(path):
            return match[1]
    return "other"


def class_of(each: hlo.Instruction, module: hlo.Module) -> str:
    """Returns the class of the kernel of an instruction, such as "matmul"."""
    base = re.sub(r"-(start|done)$", "", each.opcode)
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if base in hlo.COLLECTIVES:
        return "collective"
    if each.opcode == "custom-call":
        kind = class_of_name(target[1] if target else "")
        if kind != "other":
            return kind
        # The target of a Pallas kernel names its compiler; the scope ends with the
        # kernel's name.
        own = re.sub(r"/(pallas_call|mpmd_map)$", "", each.op_name)
        return class_of_name(own.rpartition("/")[2])
    inner = module.computations.get(each.called("calls") or "")
    opcodes = {one.opcode for one in inner.instructions} if inner else {each.opcode}
    if opcodes & set(_MATMULS):
        return "matmul"
    if opcodes & set(hlo.COLLECTIVES):
        return "collective"
    if opcodes <= _MOVES:
        return "copy"
    return "element-wise fusion" if inner else "other"


def class_of_name(name: str) -> str:
    """Returns the class of a kernel of which only the name is known."""
    for kind, pattern in _NAME_PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"
