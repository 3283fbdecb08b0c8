"""The settings that each attention kernel can run."""

from scaletrain.config.schema import RunConfig


def unable(run: RunConfig, kernel: str) -> list[tuple[str, str]]:
    """Returns the reasons why a kernel cannot run `run`, each with a remedy."""
    model, reasons = run.model, []
    if kernel in ("splash", "cudnn") and run.mesh.size("context") != 1:
        reasons.append(
            (
                f"mesh.context={run.mesh.context} cuts sequences, which it takes whole",
                "set mesh.context=1",
            )
        )
    if kernel == "splash" and run.seq_len % 128:
        reasons.append(
            (
                f"its blocks do not divide seq_len={run.seq_len}",
                "make seq_len a multiple of 128",
            )
        )
    if kernel == "cudnn":
        if run.precision.compute != "bfloat16":
            reasons.append(
                (
                    f"it does not multiply precision.compute={run.precision.compute}",
                    "set precision.compute=bfloat16",
                )
            )
        if model.attention_soft_cap:
            reasons.append(
                (
                    f"it has no model.attention_soft_cap={model.attention_soft_cap}",
                    "set it to 0",
                )
            )
        if model.d_head % 8 or model.d_head > 128:
            reasons.append(
                (
                    f"model.d_head={model.d_head} is not a multiple of 8 up to 128",
                    "change it",
                )
            )
        if run.seq_len % 64:
            reasons.append(
                (
                    f"its blocks do not divide seq_len={run.seq_len}",
                    "make seq_len a multiple of 64",
                )
            )
    return reasons
