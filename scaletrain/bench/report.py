"""The text of the record of a bench, for people."""

from collections.abc import Iterator
from typing import Any

from scaletrain import config

_GIB = 2**30


def in_words(record: dict[str, Any]) -> str:
    """Returns the text of a record, see `command.benchmark`."""
    lines = [*_head(record), "", *_roofline(record)]
    if "profile" in record:
        lines += ["", *_profile(record["profile"], record["step_time_s"])]
    if "candidates" in record:
        lines += ["", *_candidates(record["candidates"])]
    return "\n".join(lines)


def _head(record: dict[str, Any]) -> Iterator[str]:
    device, memory = record["device"], record["peak_memory_bytes"]
    model = record["config"]["model"]
    yield (
        f"{device['count']} x {device['kind']}, jax {device['jax']}: "
        f"batch_size={record['config']['batch_size']} "
        f"seq_len={record['config']['seq_len']} layers={model['layers']} "
        f"remat={model['remat']} attention={model['attention']}"
    )
    yield (
        f"Step: {record['step_time_s']:.4f} s (median; 10th to 90th percentile "
        f"{record['step_time_spread']:.1%} of it), "
        f"{record['tokens_per_s_per_device']:,.0f} tokens/s a device"
    )
    if record["mfu"] is None:
        yield "MFU: n/a, the peak of this chip is not known"
    else:
        yield (
            f"MFU: {record['mfu']:.1%}, PaLM's {record['mfu_palm']:.1%}, "
            f"of {record['peak_flops'] / 1e12:,.0f} TFLOP/s"
        )
    words = "n/a" if memory is None else f"{memory / _GIB:.2f} GiB"
    yield f"Memory at its peak: {words}; compiled in {record['compile_time_s']:.1f} s"
    if "data_wait" in record:
        yield f"Waiting for data: {record['data_wait']:.2%} of the time"


def _roofline(record: dict[str, Any]) -> Iterator[str]:
    roofline = record["roofline"]
    ideal = roofline["ideal"]
    yield (
        f"Ideal: {ideal['step_s']:.4f} s = matmuls {ideal['gemms_s']:.4f} + attention "
        f"{ideal['attention_s']:.4f} + optimizer {ideal['optimizer_s']:.4f}; "
        f"reached {record['achieved_over_ideal']:.1%} of it"
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


def _profile(profile: dict[str, Any], step_time_s: float) -> Iterator[str]:
    yield f"Trace: {profile['trace']}"
    if not profile["by_class"]:
        planes = ", ".join(profile["planes"])
        yield f"It has no kernels of the step; its planes: {planes}"
        return
    if not any(device.startswith("/device") for device in profile["devices"]):
        yield (
            "Timed on the host's threads, which share its cores; planes: "
            + ", ".join(profile["planes"])
        )
    classes = list(profile["by_class"])
    yield f"  {'ms a step':<12}" + "".join(f"{each:>21}" for each in classes)
    for scope, inner in profile["by_scope"].items():
        cells = (f"{inner.get(each, 0) * 1e3:21.3f}" for each in classes)
        yield f"  {scope:<12}" + "".join(cells)
    cells = (f"{seconds * 1e3:21.3f}" for seconds in profile["by_class"].values())
    yield f"  {'all':<12}" + "".join(cells)
    total = sum(profile["by_class"].values())
    yield f"  {total * 1e3:.3f} ms in kernels; a step takes {step_time_s * 1e3:.3f} ms"
    yield "  Longest:"
    for each in profile["largest"]:
        yield (
            f"  {each['seconds'] * 1e3:9.3f} ms  {each['scope']:<10} "
            f"{each['class']:<20} {each['name']}"
        )


def _candidates(candidates: list[dict[str, Any]]) -> Iterator[str]:
    yield "Tried, best first; words to copy:"
    yield "   tokens/s a device   step s      GiB"
    for each in candidates:
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
