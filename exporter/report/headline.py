"""The first sentence of the report page: size, quality kept with its interval, and whether vLLM was checked."""

from exporter.amounts import size
from exporter.evaluation.report_file import Report
from exporter.publishing.artifact_summary import Summary


def headline(summary: Summary) -> str:
    """One sentence: bytes before and after, the first metric of each task, the result of `mmq check`."""
    counts = summary.manifest.bytes
    parts = [f"{size(counts.after)} instead of {size(counts.before)}", *_kept(summary.report), _served(summary)]
    return "; ".join(parts) + "."


def _kept(report: Report | None) -> list[str]:
    """What each task keeps of the full-precision score by its first metric, with the 95 % interval."""
    if report is None:
        return ["quality not measured"]
    first = {measure.task: measure for measure in reversed(report.measures)}
    texts = []
    for measure in (m for m in report.measures if first[m.task] is m):
        name, difference = f"{measure.task} {measure.metric}", measure.difference
        if difference.before <= 0:
            texts.append(f"{name}: the full-precision score is 0")
            continue
        low, high = (100 * (1 + value / difference.before) for value in (difference.low, difference.high))
        kept = f"{name} keeps {100 * difference.after / difference.before:.1f} %"
        texts.append(f"{kept} (95 % interval {low:.1f} to {high:.1f}, {measure.samples} samples)")
    return texts


def _served(summary: Summary) -> str:
    if summary.serving is None:
        return "answers of vLLM not checked"
    passed = summary.serving.passed and not summary.serving.problems
    return f"answers of vLLM {summary.serving.engine} checked" if passed else "answers of vLLM differ"
