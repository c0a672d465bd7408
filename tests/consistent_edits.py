"""Edits of an artifact whose author also renews what follows from them: hashes, digests, figures and verdicts.

`tests/test_proof.py` tries them. Each is a name, a function that edits `Files`, and a part of the reason for refusal.
"""

import json
import shutil
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exporter.data.tasks import main_metric
from exporter.evaluation.answers import digest
from exporter.evaluation.judge import judge
from exporter.evaluation.report_file import TaskScores
from exporter.planning.recipe_file import load_recipe

VQA, CAPTIONS = "vqa", "captioning"
Edit = Callable[[Any], Any]


def judge_again(f: Any) -> None:
    """Compute all figures of the report from its edited scores, and the scores of its listed answers."""
    recipe = load_recipe(str(f.folder / "recipe.yaml"))
    samples = {task: TaskScores.model_validate_json(json.dumps(plain)) for task, plain in f.report["samples"].items()}
    judged = judge(samples, recipe.gates, recipe.evaluation.seed)
    f.report.update(
        measures=[row.model_dump(mode="json") for row in judged.measures],
        gates=[row.model_dump(mode="json") for row in judged.gates],
        verdict=judged.verdict,
        passed=judged.verdict == "passed",
        by_kind=judged.by_kind,
        counts={task: counts.model_dump() for task, counts in judged.counts.items()},
    )
    for row in f.report["changed"] + f.report["examples"]:
        plain = f.report["samples"][row["task"]]
        first = main_metric(row["task"], plain["scores"])
        index = plain["ids"].index(row["id"])
        row["scores"] = [plain["scores"][first][key][index] for key in ("before", "after")]


def lossless(f: Any) -> None:
    for plain in f.report["samples"].values():
        for scores in plain["scores"].values():
            scores["after"] = list(scores["before"])
    judge_again(f)


def one_better(f: Any) -> None:
    """A higher score of the artifact on a sample with the same answer of both models."""
    plain = f.report["samples"][CAPTIONS]
    index = next(i for i in range(400) if i not in plain["changed"])
    plain["scores"]["cider"]["after"][index] += 0.5
    judge_again(f)


def no_answer_changed(f: Any) -> None:
    for plain in f.report["samples"].values():
        plain["changed"] = []
    f.report["changed"] = []
    judge_again(f)


def twice_as_many(f: Any) -> None:
    """Every sample a second time, under another id."""
    for plain in f.report["samples"].values():
        size = len(plain["ids"])
        plain["ids"] += [f"{name}b" for name in plain["ids"]]
        plain["changed"] += [index + size for index in plain["changed"]]
        plain["pictures"] *= 2
        plain["kinds"] *= 2
        for scores in plain["scores"].values():
            scores.update({key: values * 2 for key, values in scores.items() if values})
    f.report["evaluation"]["samples"] = 800
    judge_again(f)


def without_file(name: str, also_source: bool = False) -> Edit:
    """Remove a file, its hash, and with `also_source` the record of the source's file."""

    def edit(f: Any) -> None:
        (f.folder / name).unlink()
        f.manifest["files"].pop(name)
        if also_source:
            f.manifest["source"]["processor"].pop(name)
            for model in f.report["evaluation"]["models"].values():
                model["processor"] = digest(f.manifest["source"]["processor"])

    return edit


def with_file(name: str, content: bytes = b"{}") -> Edit:
    def edit(f: Any) -> None:
        (f.folder / name).write_bytes(content)
        f.renew(name)

    return edit


def second_weights(f: Any) -> None:
    """Weights that vLLM would load and mmq would not."""
    shutil.copyfile(f.folder / "model.safetensors", f.folder / "model-2.safetensors")
    f.renew("model-2.safetensors")


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(f: Any) -> None:
        stored = load_file(f.folder / "model.safetensors")
        change(stored)
        save_file(stored, f.folder / "model.safetensors", {"format": "pt"})
        f.renew("model.safetensors")

    return edit


def model_config(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Change the source's part of config.json."""

    def edit(f: Any) -> None:
        def apply(config: dict[str, Any]) -> dict[str, Any]:
            change(config)
            return config

        f.text("config.json", apply)

    return edit


def other_data(f: Any) -> None:
    """Drawings under the name of a benchmark, of a model that has another name."""
    f.report["evaluation"]["data"] = "coco val2017"
    f.manifest["source"]["model"] = "me/real@0123456"

    def rename(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["model"]["repo"] = "me/real"
        return recipe

    f.text("recipe.yaml", rename)
    f.manifest["recipe"]["sha256"] = load_recipe(str(f.folder / "recipe.yaml")).digest()


def other_source(f: Any) -> None:
    """Another model as the source and as the baseline."""
    f.manifest["source"]["digest"] = "1" * 64
    f.report["evaluation"]["models"]["full precision"]["weights"] = "1" * 64


def both_models(**values: Any) -> Edit:
    return lambda f: [model.update(values) for model in f.report["evaluation"]["models"].values()]


def example(**values: Any) -> Edit:
    return lambda f: f.report["examples"][0].update(values)


def corpus(**values: list[float]) -> Edit:
    return lambda f: f.report["corpus"][CAPTIONS].update(values)


def source(**values: Any) -> Edit:
    return lambda f: f.manifest["source"].update(values)


MISSING, EDITED = "of the source is missing", "they contradict its digest"
CONSISTENT_EDITS: list[tuple[str, Edit, str]] = [
    # scores and answers
    ("lossless by its figures", lossless, "that has other scores than its text"),
    ("a better score of the same answer", one_better, "although the answers of both models are the same"),
    ("no answer changed", no_answer_changed, "two scores of vqa accuracy"),
    ("twice as many samples", twice_as_many, "not the changed ones with the largest loss"),
    ("an equal answer among the changed", lambda f: f.report["changed"][0].update(after="x", before="x"), "is not"),
    ("another answer among the examples", example(after="zzz"), "is listed as unchanged, but differs"),
    ("wrong answers with full scores", example(after="zzz", before="zzz"), "has other scores than its text"),
    ("another reference", example(references=["zzz"]), "has other scores than its text"),
    ("no reference", example(references=[]), "has other scores than its text"),
    ("no question", example(question=None), "that has no question"),
    ("no examples", lambda f: f.report.update(examples=[]), "listed examples of vqa are not its first samples"),
    ("an answer twice", lambda f: f.report["changed"].append(f.report["changed"][0]), "are not the changed ones"),
    ("an impossible corpus score", corpus(bleu4=[99.0, 99.0]), "bleu4 of captioning is not within 0 to 1"),
    ("a corpus score of nobody", corpus(spice=[0.5, 0.5]), "corpus scores of captioning are not those of mmq: spice"),
    ("no corpus scores", lambda f: f.report["corpus"].clear(), "corpus scores of captioning are not those of mmq"),
    ("corpus scores of no task", lambda f: f.report["corpus"].update(luck={}), "corpus scores of luck, but no scores"),
    # how it was measured
    ("drawings under another name", other_data, "has pictures of mmq's built-in drawings"),
    ("no data", lambda f: f.report["evaluation"].pop("data"), "does not name the data"),
    ("other settings of the scores", lambda f: f.report["evaluation"]["scoring"].clear(), "settings of the scores"),
    ("a pool of another task", lambda f: f.report["evaluation"].update(searched={"texts": 5}), "a pool of retrieval"),
    ("differences listed", lambda f: f.report["evaluation"]["baseline"].update(differs=["x"]), "lists differences"),
    ("both models sampled", both_models(generation={}), "generation settings are not those of mmq"),
    ("both models in an unknown dtype", both_models(dtype="int4"), "with dtype int4, which mmq does not have"),
    ("an unknown back end", both_models(backend="magic"), "back end 'magic'"),
    # the source
    ("another source and baseline", other_source, EDITED),
    ("no hashes of the source", source(shards={}), EDITED),
    ("other hashes of the source", source(shards={"model.safetensors": "0" * 64}), EDITED),
    ("another source's name", source(model="me/real@0123"), "the recipe demo-llava"),
    ("an adapter of nobody", source(adapter="lora"), "contradict each other about a LoRA adapter"),
    ("no hashes of the processor", source(processor={}), "differs from the source's file"),
    ("another epsilon", model_config(lambda c: c["text_config"].update(rms_norm_eps=0.1)), EDITED),
    ("another activation", model_config(lambda c: c["vision_config"].update(hidden_act="gelu")), EDITED),
    ("code in the config", model_config(lambda c: c.update(auto_map={"AutoModel": "evil.Evil"})), EDITED),
    # files
    ("no pictures' settings", without_file("preprocessor_config.json"), f"preprocessor_config.json {MISSING}"),
    ("no tokenizer", without_file("tokenizer.json"), f"tokenizer.json {MISSING}"),
    ("no chat template", without_file("chat_template.jinja"), f"chat_template.jinja {MISSING}"),
    ("no tokenizer, also of the source", without_file("tokenizer.json", also_source=True), "processor"),
    ("code", with_file("evil.py", b"import os"), "files that mmq does not write: evil.py"),
    ("a pickle", with_file("pytorch_model.bin"), "files that mmq does not write: pytorch_model.bin"),
    ("a hidden file", with_file(".env", b"SECRET=1"), "files that mmq does not write: .env"),
    ("an own card", with_file("README.md", b"# proven"), "files that mmq does not write: README.md"),
    ("an adapter's settings", with_file("adapter_config.json"), "files that mmq does not write: adapter_config.json"),
    ("second weights", second_weights, "model-2.safetensors: not part of the model, but vLLM would load it"),
    ("no list of shards", lambda f: f.manifest.update(shards=[]), "shards differ from the weight files"),
    ("another list of shards", lambda f: f.manifest.update(shards=["x.safetensors"]), "shards differ from the weight"),
    # tensors
    ("NaN", tensors(lambda t: t["multi_modal_projector.linear_1.bias"].fill_(torch.nan)), "values that are not finite"),
    ("infinity", tensors(lambda t: t["language_model.model.norm.weight"].fill_(torch.inf)), "that are not finite"),
    (
        "scales of a cache that the recipe does not have",
        tensors(lambda t: t.update({"language_model.model.layers.0.self_attn.k_scale": torch.ones(1)})),
        "scales of the KV cache differ from the recipe's",
    ),
]  # fmt: skip
