"""A bench as a person reads it."""

from collections.abc import Iterator
from typing import Any

from scaletrain import config

_GIB = 2**30


def in_words(found: dict[str, Any]) -> str:
    """Returns the text of a bench."""
    lines = [*_head(found), "", *_roofline(found)]
    if "profile" in found:
        lines += ["", *_profile(found["profile"], found["step_time_s"])]
    if "candidates" in found:
        lines += ["", *_candidates(found["candidates"])]
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> Iterator[str]:
    device, memory = found["device"], found["peak_memory_bytes"]
    model = found["config"]["model"]
    yield (
        f"{device['count']} x {device['kind']}, jax {device['jax']}: "
        f"batch_size={found['config']['batch_size']} "
        f"seq_len={found['config']['seq_len']} layers={model['layers']} "
        f"remat={model['remat']} attention={model['attention']}"
    )
    yield (
        f"Step: {found['step_time_s']:.4f} s (median; 10th to 90th percentile "
        f"{found['step_time_spread']:.1%} of it), "
        f"{found['tokens_per_s_per_device']:,.0f} tokens/s a device"
    )
    if found["mfu"] is None:
        yield "MFU: n/a, the peak of this chip is not known"
    else:
        yield (
            f"MFU: {found['mfu']:.1%}, PaLM's {found['mfu_palm']:.1%}, "
            f"of {found['peak_flops'] / 1e12:,.0f} TFLOP/s"
        )
    words = "n/a" if memory is None else f"{memory / _GIB:.2f} GiB"
    yield f"Memory at its peak: {words}; compiled in {found['compile_time_s']:.1f} s"
    if "data_wait" in found:
        yield f"Waiting for data: {found['data_wait']:.2%} of the time"


def _roofline(found: dict[str, Any]) -> Iterator[str]:
    roofline = found["roofline"]
    ideal = roofline["ideal"]
    yield (
        f"Ideal: {ideal['step_s']:.4f} s = matmuls {ideal['gemms_s']:.4f} + attention "
        f"{ideal['attention_s']:.4f} + optimizer {ideal['optimizer_s']:.4f}; "
        f"reached {found['achieved_over_ideal']:.1%} of it"
    )
    yield f"  {'ms':<14}{'shape':>24}{'x':>6}  forward    dgrad    wgrad  TFLOP/s"
    for name, each in roofline["gemms"].items():
        shape = f"{each['rows']} x {each['inputs']} x {each['outputs']}"
        times = (each.get(f"{k}_s") for k in ("forward", "dgrad", "wgrad"))
        cells = "".join(f"{'' if t is None else f'{t * 1e3:.3f}':>9}" for t in times)
        yield (
            f"  {name:<14}{shape:>24}{each['count']:>6}{cells}"
            f"{each['flops'] / 1e12:9.2f}"
        )
    for name, each in roofline["attention"].items():
        yield (
            f"  {name + ' attention':<19}{each['implementation']:>19}"
            f"{each['count']:>6}{each['forward_s'] * 1e3:9.3f}  both"
            f"{each['forward_backward_s'] * 1e3:12.3f}{each['flops'] / 1e12:9.2f}"
        )
    yield f"  all matmuls {roofline['gemm_flops'] / 1e12:.2f} TFLOP/s, copies " + (
        f"{roofline['copy_bandwidth'] / 1e9:,.1f} GB/s"
    )
    for axis, speeds in roofline["collectives"].items():
        words = ", ".join(
            f"{name.replace('_', '-')} {speed / 1e9:,.1f}"
            for name, speed in speeds.items()
        )
        yield f"  over mesh.{axis}, bus bandwidth in GB/s: {words}"


def _profile(found: dict[str, Any], step_time_s: float) -> Iterator[str]:
    yield f"Trace: {found['trace']}"
    if not found["by_class"]:
        yield f"It has no kernels of the step; its planes: {', '.join(found['planes'])}"
        return
    if not any(device.startswith("/device") for device in found["devices"]):
        yield (
            "Timed on the host's threads, which share its cores; planes: "
            + ", ".join(found["planes"])
        )
    classes = list(found["by_class"])
    yield f"  {'ms a step':<12}" + "".join(f"{each:>21}" for each in classes)
    for scope, inner in found["by_scope"].items():
        cells = (f"{inner.get(each, 0) * 1e3:21.3f}" for each in classes)
        yield f"  {scope:<12}" + "".join(cells)
    cells = (f"{seconds * 1e3:21.3f}" for seconds in found["by_class"].values())
    yield f"  {'all':<12}" + "".join(cells)
    total = sum(found["by_class"].values())
    yield f"  {total * 1e3:.3f} ms in kernels; a step takes {step_time_s * 1e3:.3f} ms"
    yield "  Longest:"
    for each in found["largest"]:
        yield (
            f"  {each['seconds'] * 1e3:9.3f} ms  {each['scope']:<10} "
            f"{each['class']:<20} {each['name']}"
        )


def _candidates(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "Tried, best first; words to copy:"
    yield "   tokens/s a device   step s      GiB"
    for each in found:
        words = " ".join(config.flags(each["overrides"])) or "(as configured)"
        if each["fits"]:
            memory = each["peak_memory_bytes"]
            size = "n/a" if memory is None else f"{memory / _GIB:.2f}"
            yield (
                f"  {each['tokens_per_s_per_device']:18,.0f}{each['step_time_s']:9.4f}"
                f"{size:>9}  {words}"
            )
        else:
            yield f"  {each['problem'][:36]:>36}  {words}"
