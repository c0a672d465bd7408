"""The first sentence of report page and model card: size, kept quality with its interval, whether vLLM was checked."""

from exporter.amounts import size
from exporter.evaluation.report_file import Measure, Report
from exporter.publishing.artifact_summary import Summary


def headline(summary: Summary) -> str:
    """One sentence: bytes before and after, the first metric of each task, the result of `mmq check`."""
    counts = summary.manifest.bytes
    parts = [f"{size(counts.after)} instead of {size(counts.before)}", *_kept(summary.report), _served(summary)]
    return "; ".join(parts) + "."


def relative_change(report: Report, measure: Measure) -> dict[str, float] | None:
    """Change of a metric with its interval, as shares of the full-precision score; None when that score is 0.

    It is the interval by which a gate decides; that of a metric with a gate is the recorded one.
    """
    gates = {(gate.task, gate.metric): gate for gate in report.gates}
    gate, difference = gates.get((measure.task, measure.metric)), measure.difference
    if difference.before <= 0:
        return None
    if gate and gate.change is not None and gate.low is not None and gate.high is not None:
        return {"change": gate.change, "low": gate.low, "high": gate.high}
    low, high = measure.interval()
    absolute = {"change": difference.change, "low": low, "high": high}
    return {name: value / difference.before for name, value in absolute.items()}


def _kept(report: Report | None) -> list[str]:
    """What each task keeps of the full-precision score by its first metric, with the 95 % interval."""
    if report is None:
        return ["quality not measured"]
    first = {measure.task: measure for measure in reversed(report.measures)}
    texts = []
    for measure in (m for m in report.measures if first[m.task] is m):
        name, relative = f"{measure.task} {measure.metric}", relative_change(report, measure)
        if relative is None:
            texts.append(f"{name}: the full-precision score is 0")
            continue
        kept, low, high = (100 * (1 + relative[key]) for key in ("change", "low", "high"))
        interval = f"95 % interval {low:.1f} to {high:.1f}, {measure.samples} samples"
        texts.append(f"{name} keeps {kept:.1f} % ({interval})")
    return texts


def _served(summary: Summary) -> str:
    if summary.serving is None:
        return "answers of vLLM not checked"
    passed = summary.serving.passed and not summary.serving.problems
    return f"answers of vLLM {summary.serving.engine} checked" if passed else "answers of vLLM differ"
