"""A small artifact of a random LLaVA, with a report: what publishing needs, without the embedded model."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from exporter.artifact.artifact import Artifact
from exporter.data.tasks import TASKS
from exporter.data.tasks.captioning import score as captioning_score
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.evaluation.answers import digest
from exporter.evaluation.backends import ARTIFACT, SOURCE, weights_digest
from exporter.evaluation.bootstrap import CONFIDENCE, RESAMPLES, paired_bootstrap
from exporter.evaluation.evaluate import compare
from exporter.evaluation.evaluation_record import AnswersRecord, Bootstrap, EvaluationRecord
from exporter.evaluation.report_file import Report, write_report
from exporter.events import ignore
from exporter.model.families import FAMILIES
from exporter.model.inference.predict_server import generation
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """A LLaVA of random weights in hub layout: config.json, shards, one text file."""
    family = FAMILIES["llava"]
    config = dict(family.tiny_config()) | {"architectures": ["LlavaForConditionalGeneration"]}
    torch.manual_seed(seed)
    model = family.skeleton(config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        family.canonical_name(name): (torch.randn(p.shape) * 0.05).to(torch.float16)
        for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"max_length": 64}')
    return folder


def recipe(model: Path, bits: int = 4) -> Recipe:
    """Rounding to nearest, which needs no calibration data."""
    data = load_recipe("llava-w4").model_dump()
    rule = {"component": "language", "method": "rtn", "bits": bits, "group_size": 16}
    gates = [{"task": "vqa", "metric": "accuracy", "max_drop": 0.05}]
    data |= {
        "name": f"rtn-{bits}",
        "quantize": [rule],
        "model": {"repo": str(model), "family": "llava"},
        "gates": gates,
    }
    return Recipe.model_validate(data)


def tiny_artifact(folder: Path, model: Path, bits: int = 4) -> Path:
    """An exported artifact whose gates passed on invented answers."""
    export(recipe(model, bits), out=folder, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
    write_scores(folder, after=0.88)
    return folder


def write_scores(folder: Path, after: float, before: float = 0.9, samples: int = 500, seed: int = 0) -> Report:
    """A report as an evaluation writes it, of a model that answers that share of the questions rightly."""
    questions = [sample(i) for i in range(samples)]
    answers = [
        [s.references[0] if i < share * samples else "?" for i, s in enumerate(questions)] for share in (before, after)
    ]
    gates = load_recipe(str(folder / "recipe.yaml")).gates
    report = compare({"vqa": answers[0]}, {"vqa": answers[1]}, {"vqa": questions}, gates, seed)
    artifact = Artifact.open(folder)
    weights = {SOURCE: artifact.manifest.source.digest, ARTIFACT: weights_digest(artifact)}
    processor = digest(artifact.manifest.source.processor)
    about = EvaluationRecord(
        data="folder mine",
        samples=samples,
        seed=seed,
        bootstrap=Bootstrap(resamples=RESAMPLES, confidence=CONFIDENCE, seed=seed),
        models={
            name: AnswersRecord.model_validate(
                {"weights": weight or "", "processor": processor, "backend": "transformers", "dtype": "float32"}
                | {"generation": {task: generation(artifact.family, task) for task in artifact.family.max_new_tokens}}
            )
            for name, weight in weights.items()
        },
        scoring={"vqa": dict(TASKS["vqa"].method())},
    )
    report = report.model_copy(update={"evaluation": about})
    write_report(folder, report, None)
    return report


def sample(i: int) -> Sample:
    """A question with an answer and a picture of its own."""
    return Sample(
        f"s{i}",
        lambda: Image.new("RGB", (2, 2), (i % 256, i // 256, 7)),
        f"question {i}?",
        (f"answer {i}",),
        "even" if i % 2 else "odd",
    )


@cache
def _bootstrap(before: tuple[float, ...], after: tuple[float, ...], options: tuple[tuple[str, Any], ...]) -> Any:
    return paired_bootstrap(before, after, **dict(options))


@cache
def _captions(answers: tuple[str, ...], references: tuple[tuple[str, ...], ...]) -> dict[str, list[float]]:
    samples = [Sample("", lambda: Image.new("RGB", (1, 1)), None, texts) for texts in references]
    return captioning_score(answers, samples)


def score_captions_once(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """The scores of captions, computed once for equal texts: most tests leave them as they are."""
    return _captions(tuple(answers), tuple(sample.references for sample in samples))


def bootstrap_once(before: Sequence[float], after: Sequence[float], **options: Any) -> Any:
    """The bootstrap, computed once for equal scores: most tests leave them as they are."""
    return _bootstrap(tuple(before), tuple(after), tuple(options.items()))
