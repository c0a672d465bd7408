"""The result of `mmq bench` as rows of a table, for the terminal, the report and the model card."""

from exporter.amounts import size
from exporter.evaluation.speed_record import SpeedFigures, SpeedRecord

MEMORY = {"weights": "weight_bytes", "peak memory, host": "peak_bytes", "peak memory, GPU": "gpu_bytes"}


def conditions(record: SpeedRecord) -> str:
    """How the figures were measured: engine, device, requests, and what is not counted."""
    requests = f"{record.tokens} tokens a request, {record.requests} requests a client"
    warm_up = f"{record.warm_up} warm-up request{'s' * (record.warm_up > 1)} of each client, not counted"
    before = f", after {warm_up}" if record.warm_up else "; the first figure includes the warm-up"
    return f"{record.engine} on {record.device}; {requests}{before}"


def figures_rows(artifact: SpeedFigures, source: SpeedFigures | None) -> list[tuple[str, str, str, str]]:
    """Rows of a table: name, artifact, source, and artifact relative to source; only figures of the artifact."""
    rows = [
        _row("load", artifact.load_seconds, source and source.load_seconds, "{:.1f} s"),
        _row("first token, 1 client", artifact.first_token_seconds, source and source.first_token_seconds, "{:.3f} s"),
    ]
    for clients, rate in artifact.tokens_per_second.items():
        name = f"tokens per second, {clients} client{'s' * (clients != '1')}"
        rows.append(_row(name, rate, source and source.tokens_per_second.get(clients), "{:.1f}"))
    for name, key in MEMORY.items():
        value, other = getattr(artifact, key), getattr(source, key, None)
        if value is not None:
            ratio = f"{value / other:.2f} x" if other else ""
            rows.append((name, size(value), "" if other is None else size(other), ratio))
    return rows


def _row(name: str, value: float, other: float | SpeedFigures | None, form: str) -> tuple[str, str, str, str]:
    known = other if isinstance(other, float) else None
    ratio = f"{value / known:.2f} x" if known else ""
    return name, form.format(value), "" if known is None else form.format(known), ratio
