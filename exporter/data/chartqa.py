"""ChartQA from the official files: `test/test_human.json`, `test/test_augmented.json` and the charts in `test/png/`.

Each file is a list of objects with `imgname`, `query` and `label` (github.com/vis-nlp/ChartQA, Masry et al., arXiv
2203.10244). A sample's kind is `human` or `augmented`, its id the kind and the position in the file.
"""

from pathlib import Path
from typing import Any

from exporter.data.conventions import CONVENTIONS
from exporter.data.rows import BadRowError, Row, Rows, below, first_file, first_folder, load_json, text, to_samples
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

KINDS = ("human", "augmented")
PLACES = ("{}/", "ChartQA Dataset/{}/", "ChartQA_Dataset/{}/", "")  # folders of a split

_CONVENTION = CONVENTIONS["chartqa"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` questions of both files of a split; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    subset = _CONVENTION.splits[split]
    places = [place.format(subset) for place in PLACES]
    files = {
        kind: first_file(path, [f"{place}{subset}_{kind}.json" for place in places], "questions", _CONVENTION.layout)
        for kind in KINDS
    }
    folder = first_folder(path, [f"{place}png" for place in places], "charts", _CONVENTION.layout)
    result = Rows(path)
    for kind, file in files.items():
        listed = load_json(file)
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise DataError(f"{file} is not a list of questions", "use the official file of this data set")
        for i, entry in enumerate(listed):
            where = f"{file.name}: [{i}]"
            with result.at(where):
                result.rows.append(_row(path, folder, where, kind, i, entry))
    return to_samples(result, limit, seed, f"{path} has no question of split {subset}")


def _row(path: Path, folder: Path, where: str, kind: str, i: int, entry: dict[str, Any]) -> Row:
    picture = below(folder, text(entry, "imgname"))
    label = entry.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | float) or not str(label).strip():
        raise BadRowError("`label` must be a non-empty string or a number")
    shown = picture.relative_to(path).as_posix()
    question, metrics = text(entry, "query"), _CONVENTION.measured
    return Row(where, shown, picture, f"{kind}-{i}", question, (str(label),), kind, metrics)
