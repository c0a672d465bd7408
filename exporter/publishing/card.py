"""Render the model card (README.md) of an artifact from its manifest and report.

Metadata: https://github.com/huggingface/hub-docs/blob/main/modelcard.md; results of benchmarks:
https://huggingface.co/docs/hub/eval-results.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.data import BUILT_IN
from exporter.data.hub import repo_of
from exporter.evaluation.gate_text import sentence
from exporter.evaluation.report_file import Report
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.numerics.kv_caches import BY_FLAG
from exporter.publishing.artifact_summary import Summary, drawings_note
from exporter.publishing.card_serving import serving, speed_section
from exporter.publishing.card_table import table
from exporter.publishing.card_usage import creation, hardware, provenance, python_example
from exporter.publishing.headline import headline

CARD = "README.md"
RESULTS = ".eval_results/mmq.yaml"
PIPELINES = {"blip2-itm": "zero-shot-image-classification"}  # as in transformers
HUB_TASKS = {"vqa": "visual-question-answering", "captioning": "image-to-text"}
DRAWINGS = "mmq's built-in drawings"
BEGIN, END = "<!-- changelog:begin -->", "<!-- changelog:end -->"
CITATION = """```bibtex
@article{das2026towards,
  title   = {Towards Understanding Best Practices for Quantization of Vision-Language Models},
  author  = {Das and La and Lau and Shrivastava and Gwilliam},
  journal = {arXiv preprint arXiv:2601.15287},
  year    = {2026}
}
```"""


@dataclass(frozen=True)
class CardDeclarations:
    """Facts for the card that the publisher gives, because the artifact does not have them.

    base_model: hub id when the source is a local folder. license: card keys (`license`, `license_name`,
    `license_link`). benchmarks: task -> (data set on the hub that the test samples are from, its task id).
    """

    base_model: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    benchmarks: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def base_model(summary: Summary, declared: CardDeclarations) -> str | None:
    """Hub id of the full-precision model; None when it is unknown."""
    repo, at, _ = summary.source.partition("@")
    return declared.base_model or (repo if at and repo.count("/") == 1 else None)


def render(repo: str, summary: Summary, declared: CardDeclarations, problems: Sequence[str], changelog: str) -> str:
    """Text of README.md. problems: reasons against publishing that `--force` overrides; the card lists them first."""
    sections = [
        f"# {repo.partition('/')[2]}",
        f"**{headline(summary)}**",
        _introduction(summary, declared),
        _warning(problems),
        "## What was quantized\n\n" + _parts(summary),
        "## Quality\n\n" + _quality(summary),
        "## How it was made\n\n" + creation(summary, base_model(summary, declared)),
        "## Serving\n\n" + serving(repo, summary),
        python_example(repo, summary),
        "## Hardware\n\n" + hardware(summary),
        speed_section(summary),
        "## Calibration\n\n" + _calibration(summary),
        "## Provenance\n\n" + provenance(repo, summary),
        "## Limitations\n\n" + _limits(summary),
        f"## Changelog\n\n{BEGIN}\n{changelog}\n{END}" if changelog else "",
        "## Citation\n\nThe recipe is based on the results of this paper:\n\n" + CITATION,
    ]
    return f"---\n{metadata(repo, summary, declared, problems)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def metadata(repo: str, summary: Summary, declared: CardDeclarations, problems: Sequence[str]) -> str:
    """YAML metadata of the card, written by the classes of the hub library."""
    from huggingface_hub import ModelCardData

    widths = sorted({_width(part.scheme) for part in summary.parts if part.packed})
    methods = sorted({method for part in summary.parts for method in part.methods})
    tags = ["vllm", summary.manifest.format.replace("_", "-"), *widths, *methods, "vision", "mmq"]
    base = base_model(summary, declared)
    results = eval_results(summary)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(summary.manifest.family, "image-text-to-text"),
        tags=[*tags, "unproven"] if problems else tags,
        datasets=list(declared.datasets) or known_datasets(summary) or None,
        language=list(declared.language) or None,
        model_name=repo.partition("/")[2],
        eval_results=results or None,
        base_model_relation="quantized" if base else None,
        quantized_by="mmq",
        **dict(declared.license),
    )
    return str(data.to_yaml()).strip()


def eval_results(summary: Summary) -> list[Any]:
    """The artifact's scores as entries of the card's `model-index`."""
    from huggingface_hub import EvalResult

    name = data_name(summary)
    kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return [
        EvalResult(
            task_type=HUB_TASKS.get(m.task, m.task),
            dataset_type=kind,
            dataset_name=f"{name} ({m.samples} samples)",
            dataset_split="test",
            metric_type=m.metric,
            metric_name=f"{m.metric} (full precision: {m.difference.before:.4f})",
            metric_value=round(m.difference.after, 6),
        )
        for m in (summary.report.measures if summary.report else ())
    ]


def benchmark_results(summary: Summary, declared: CardDeclarations) -> str:
    """Text of the `.eval_results` file for tasks with test samples of a hub benchmark; empty without such tasks."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries, written = [], set()
    for m in summary.report.measures if summary.report else ():
        if m.task in declared.benchmarks and m.task not in written:  # only the first metric of a task
            dataset, task = declared.benchmarks[m.task]
            note = f"{m.metric}, {m.samples} samples, full precision {m.difference.before:.4f}"
            value = round(m.difference.after, 6)
            entries.append(EvalResultEntry(dataset_id=dataset, task_id=task, value=value, notes=note))
            written.add(m.task)
    return str(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)) if entries else ""


def known_datasets(summary: Summary) -> list[str]:
    """Hub ids of those calibration data that are data sets on the hub."""
    calibration = summary.manifest.provenance.calibration
    names = [name.removeprefix("hub ") for name in calibration.data.split(", ") if name.startswith("hub ")]
    return sorted({repo for name in names if (repo := repo_of(name))}) if calibration.samples else []


def data_name(summary: Summary) -> str:
    """Readable name of the data source of the test samples."""
    calibration = summary.manifest.provenance.calibration.data
    measured = summary.report.evaluation.data if summary.report else None
    return readable_sources(calibration if measured is None else measured)


def readable_sources(data: str) -> str:
    """A data source of a manifest with readable names for the built-in data."""
    return ", ".join(DRAWINGS if name in BUILT_IN else name for name in str(data).split(", "))


def _introduction(summary: Summary, declared: CardDeclarations) -> str:
    base = base_model(summary, declared)
    if base:
        source = f"[{base}](https://huggingface.co/{base})"
    elif summary.source in MODELS:
        source = f"The small model `{summary.source}` that mmq includes"
    else:
        source = f"A local model (`{summary.source}`)"
    if adapter := summary.manifest.source.adapter:
        source += f" with the LoRA adapter `{adapter}` merged"
    size, changes = summary.manifest.bytes, summary.recipe.changes()
    recipe = f"`{summary.recipe.name}`" + (f" (changed: {changes})" if changes else "")
    return (
        f"{source}, quantized by mmq with the recipe {recipe} into an artifact that vLLM serves: "
        f"{gigabytes(size.after)} instead of {gigabytes(size.before)}, "
        f"{summary.manifest.bits_per_weight:.2f} bits per weight, including scales and all other tensors."
    )


def _warning(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    lines = "\n".join(f"> - {line}" for problem in problems for line in problem.splitlines())
    return f"> [!WARNING]\n> **Published by force.** mmq refused to publish this artifact:\n{lines}"


def _width(scheme: str) -> str:
    """Hub tag of a scheme's label: `w4a16`, `w8a8`, `w4a8`, `fp8`, `nvfp4`."""
    first = scheme.partition(" ")[0].lower()
    return first if "fp" in first else first + ("a8" if scheme.endswith((" A8", " A-FP8")) else "a16")


def _parts(summary: Summary) -> str:
    rows = [
        [part.component, str(part.linears), part.scheme, "/".join(part.methods), "packed" if part.packed else "16 bits"]
        for part in summary.parts
    ]
    named = {part.component for part in summary.parts}
    components = [c.name for c in FAMILIES[summary.manifest.family].components]
    rows += [[name, "", "16 bits, not quantized", "", "as in the source"] for name in components if name not in named]
    rows.append(["all other tensors", "", "16 bits, not quantized", "", "as in the source"])
    return (
        table(["component", "linears", "scheme", "method", "stored"], rows)
        + "\n\n`W4 g128` means 4-bit weights with one scale per group of 128 weights of a row; `row` means one scale "
        "per row. Activations stay in 16 bits unless the scheme has `A8` or `A-FP8`."
        + _cache_text(summary.recipe.kv_cache)
    )


def _cache_text(cache: str | None) -> str:
    """A sentence about the number type of the KV cache; empty for 16 bits."""
    if cache and cache in BY_FLAG:
        bits = BY_FLAG[cache]
        return f" The scores hold for a KV cache of {bits} bits, `--kv-cache-dtype {cache}`."
    return " The KV cache is in float8 (e4m3)." if cache else ""


def _quality(summary: Summary) -> str:
    if summary.report is None:
        return "The artifact was never evaluated."
    rows = []
    for m in summary.report.measures:
        d, (low, high) = m.difference, m.interval()
        recovery = f"{d.after / d.before:.1%}" if d.before > 0 else ""
        scores = [
            f"{d.before:.4f}",
            f"{d.after:.4f}",
            recovery,
            signed(d.change),
            f"{signed(low)} to {signed(high)}",
        ]
        rows.append([m.task, m.metric, str(m.samples), *scores])
    head = ["task", "metric", "samples", "full precision", "this model", "recovery", "change", "95 % interval"]
    other, prompts = summary.other_baseline, summary.report.evaluation.prompts_text(summary.report.samples)
    parts = [
        f"> [!WARNING]\n> The full-precision scores come from **another model than the source**: {other}."
        if other
        else "",
        f"Both models answered the same samples ({data_name(summary)}) with greedy decoding; intervals are from a "
        "paired bootstrap and cover losses that no sample showed.",
        table(head, rows) + "\n\nRecovery is this model's score as a share of the full-precision score.",
        f"Prompts, inside the chat template: {prompts}." if prompts else "",
        _gates(summary.report),
        drawings_note(summary),
    ]
    return "\n\n".join(filter(None, parts))


def _gates(report: Report) -> str:
    """Verdicts of the recipe's gates, and one sentence per gate with its interval."""
    if not report.gates:
        return "The recipe has no gates."
    gates = [[g.task, g.metric, g.verdict if g.verdict == "passed" else f"**{g.verdict}**"] for g in report.gates]
    lines = "\n".join(f"- {sentence(gate)}" for gate in report.gates)
    return table(["gate", "metric", "verdict"], gates) + "\n\n" + lines


def signed(value: float) -> str:
    """Signed number with 4 decimals, such as `+0.0123`; a rounded zero is `+0.0000`."""
    return f"{value:+z.4f}"


def _calibration(summary: Summary) -> str:
    calibration = summary.manifest.provenance.calibration
    if not calibration.samples:
        return "None: no method of this recipe needs data."
    return (
        f"{len(calibration.samples)} training samples of {readable_sources(calibration.data)}, selected with seed "
        f"{calibration.seed}. `mmq_manifest.json` lists their ids and the hashes of their pictures. mmq compares their "
        "pixels with those of the test samples and stops when a picture is in both sets."
    )


def _limits(summary: Summary) -> str:
    lines = []
    if DRAWINGS in data_name(summary):
        lines.append("- The drawings show colored shapes. Scores on them show that the model works, not its quality.")
    lines += [f"- note of the quantization: {note}" for note in summary.manifest.notes]
    lines.append("- The scores hold for the samples above. Evaluate the model on your own data before you use it.")
    lines.append("- The limitations and the license of the source model also apply to this model.")
    return "\n".join(lines)


def gigabytes(count: float) -> str:
    """Bytes as a text in GB, or in MB below 1 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
