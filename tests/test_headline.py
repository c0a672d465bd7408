"""The first sentence of the report page is that of the manifest's and report's figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from exporter.evaluation.report_file import Report
from exporter.publishing.artifact_summary import Summary, folder_reader, read_summary
from exporter.publishing.headline import headline
from exporter.publishing.report import collect, html


@pytest.fixture(scope="module")
def summary(random_artifacts: Path) -> Summary:
    """An artifact with accuracy 0.9 -> 0.88, interval -0.034 to -0.008, 500 samples."""
    return read_summary("w4", folder_reader(random_artifacts / "w4"))


def test_size_kept_quality_and_serving_are_in_one_sentence(summary: Summary) -> None:
    text = headline(summary)
    assert " instead of " in text.split("; ")[0]
    assert "vqa accuracy keeps 97.8 % (95 % interval 96.2 to 99.1, 500 samples)" in text
    assert text.endswith("; answers of vLLM not checked.")
    page = html(collect(summary, {}))
    assert f'<p class="headline">{text}</p>' in page
    assert "were not checked" in page


def test_only_the_first_metric_of_a_task_is_named(summary: Summary) -> None:
    report = summary.report
    assert isinstance(report, Report)
    (measure,) = report.measures
    zero = measure.difference.model_copy(update={"before": 0.0})
    other = measure.model_copy(update={"metric": "other"})
    captions = measure.model_copy(update={"task": "captioning", "metric": "cider", "difference": zero})
    more = replace(summary, report=report.model_copy(update={"measures": (measure, other, captions)}))
    parts = headline(more).split("; ")
    assert [part.split(" keeps")[0] for part in parts[1:3]] == [
        "vqa accuracy",
        "captioning cider: the full-precision score is 0",
    ]
    assert len(parts) == 4


def test_an_artifact_without_evaluation_says_so(summary: Summary) -> None:
    assert "; quality not measured; " in headline(replace(summary, report=None))
