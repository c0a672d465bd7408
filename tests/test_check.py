"""`mmq check` without an engine: shapes, schemes, doubled scales, prompts, and the report."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact
from exporter.commands.serving_text import checked_page
from exporter.data.tasks.sample import Sample
from exporter.device import Device, choose
from exporter.errors import ServeError
from exporter.evaluation.report_file import write_report
from exporter.formats import FORMATS
from exporter.model.embedded import MODELS
from exporter.model.inference.openai_client import png
from exporter.model.inference.predict import prompt_inputs
from exporter.model.processors.processor import load_processor
from exporter.numerics.quantized import Scheme
from exporter.pipeline.export import export
from exporter.pipeline.serving_check import questions
from exporter.planning.plan import engine_linears as planned_linears
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.serving import reference
from exporter.serving.check import (
    CheckResult,
    scheme_problems,
    store_result,
)
from exporter.serving.comparison import Control, distance_problems
from exporter.serving.negative_control import SCALES, double_scales, doubled_scale, modules_of
from exporter.serving.preflight import engine_linears, refuse_unservable
from exporter.serving.reference import Distance, EngineComparison, Reference, before_placeholder, listed_tokens
from exporter.serving.vllm_engine import Reply
from tests.test_evaluate import crafted
from tests.test_formats import BLOCKS, NARROW, random_linear

A8 = {"component": "vision", "bits": 8, "activations": "int8"}
W4 = {"component": "language", "bits": 4, "group_size": 128}
ASYMMETRIC = W4 | {"symmetric": False}
SMALLEST_NORMAL = 2.0**-14  # of float16
RULES = {"compressed_tensors": [A8, W4], "gptq": [W4], "awq": [ASYMMETRIC]}


def exported(out: Path, format_name: str, model: str = "demo-llava") -> tuple[Path, object]:
    """An artifact of the demo model, rounded to nearest, in the given format."""
    data = load_recipe("llava-w4").model_dump() | {"format": format_name, "quantize": RULES[format_name]}
    data["model"] |= {"repo": model}
    recipe = Recipe.model_validate(data)
    done = export(recipe, out=out, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
    return out, done.plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("check") / "mixed", "compressed_tensors")[0]


@pytest.mark.parametrize("format_name", RULES)
def test_shapes_from_headers_are_those_of_the_plan(tmp_path: Path, format_name: str):
    out, plan = exported(tmp_path / "artifact", format_name)
    planned = {x.name: x for x in planned_linears(plan.rows, plan.family) if x.scheme}
    actual = {x.name: x for x in engine_linears(Artifact.open(out))}
    assert actual.keys() == planned.keys()
    assert {(n, x.engine, x.shape) for n, x in actual.items()} == {(n, x.engine, x.shape) for n, x in planned.items()}


def test_an_unservable_artifact_is_refused_before_the_engine_starts(folder: Path, tmp_path: Path):
    artifact = Artifact.open(folder)
    refuse_unservable(artifact, on="cpu", tensor_parallel=1)
    with pytest.raises(ServeError, match="rule tensor-parallel: "):
        refuse_unservable(artifact, on=None, tensor_parallel=2)  # 128 inputs in groups of 128
    data = load_recipe("llava-w8").model_dump()
    data["model"] |= {"repo": "demo-llava"}
    eight = tmp_path / "eight"
    export(Recipe.model_validate(data), out=eight, device=choose("cpu"), on_event=lambda e: None, skip_evaluation=True)
    refuse_unservable(Artifact.open(eight), on=None, tensor_parallel=2)
    with pytest.raises(ServeError, match="text_config: 2 attention heads cannot be divided among 4 GPUs"):
        refuse_unservable(Artifact.open(eight), on=None, tensor_parallel=4)
    with pytest.raises(ServeError, match="rule kernel: W8"):
        refuse_unservable(Artifact.open(eight), on="cpu", tensor_parallel=1)


def test_a_config_that_names_some_members_of_a_fused_linear_is_refused(folder: Path, tmp_path: Path):
    """vLLM would read q, k and v by one scheme, or stop when it loads them."""
    edited = Path(shutil.copytree(folder, tmp_path / "edited"))
    config = json.loads((edited / "config.json").read_text())
    name = next(linear.name for linear in engine_linears(Artifact.open(folder)) if linear.name.endswith("q_proj"))
    config["quantization_config"]["ignore"].append(name)
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServeError, match=r"rule pattern: .*`ignore` names only some of its members"):
        refuse_unservable(Artifact.open(edited), on=None, tensor_parallel=1)


def log_of(artifact: Artifact) -> dict[str, str]:
    """Schemes in the log of a correct engine."""
    classes = {"vision": "CompressedTensorsW8A8Int8", "language": "CompressedTensorsWNA16"}
    names = {name: modules_of(artifact, name) for name in classes}
    return {artifact.family.engine_name(m): classes[name] for name, modules in names.items() for m in modules}


def test_every_linear_must_have_its_scheme_in_the_log(folder: Path):
    artifact = Artifact.open(folder)
    log = log_of(artifact)
    assert scheme_problems(artifact, log) == []
    name = "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"
    (problem,) = scheme_problems(artifact, {k: v for k, v in log.items() if k != name})
    assert problem.startswith(f"{name}: the scheme in vllm's log is none")
    assert len(scheme_problems(artifact, log | {name: "CompressedTensorsWNA16"})) == 1


def test_doubled_scales_double_one_component_and_nothing_else(folder: Path, tmp_path: Path):
    artifact = Artifact.open(folder)
    doubled = Artifact.open(double_scales(artifact, folder, "vision", tmp_path / "doubled"))
    vision = set(modules_of(artifact, "vision"))
    assert vision
    for name in artifact.names():
        factor = 2 if name.removesuffix(".weight") in vision and name.endswith(".weight") else 1
        assert torch.equal(doubled.read(name), artifact.read(name) * factor), name


def replies_of(reference: Reference, artifact: Artifact, processor: object, samples: Sequence[Sample]) -> list[Reply]:
    """What an engine answers that computes as the reference does."""
    replies = []
    for sample in samples:
        prompt = tuple(prompt_inputs(processor, artifact.family, sample)["input_ids"][0].tolist())
        tokens = (7, 8, 9)
        log_probs = reference.log_probabilities(sample, Reply("", prompt, tokens, (), ({},) * 3))
        tops = tuple({int(i): float(row[i]) for i in row.topk(5).indices} for row in log_probs)
        logprobs = tuple(float(row[token]) for row, token in zip(log_probs, tokens, strict=True))
        replies.append(Reply("", prompt, tokens, logprobs, tops))
    return replies


def test_the_reference_is_close_to_itself_and_far_from_doubled_scales(folder: Path, tmp_path: Path):
    """An engine with the reference's answers passes; the control with doubled scales does not."""
    samples = questions(folder, (), 4)
    artifact, processor, cpu = Artifact.open(folder), load_processor(folder), choose("cpu")
    reference = Reference(artifact, processor, cpu)
    replies = replies_of(reference, artifact, processor, samples)
    assert reference.prompt_problems(samples, replies) == []
    compared = reference.compare(samples, replies)
    assert compared.distance.largest < 1e-6
    assert compared.floor.largest > 0
    assert compared.close(0.015)
    log_probs, first = (
        reference.log_probabilities(samples[0], Reply("", (), tokens, (), ({},) * len(tokens)))
        for tokens in ((7, 8, 9), (7,))
    )
    assert (len(log_probs), len(first)) == (3, 1)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(3))  # of the whole vocabulary
    assert torch.allclose(log_probs[0], first[0], atol=1e-4)  # later tokens of the answer do not change it
    doubled = Artifact.open(double_scales(artifact, folder, "vision", tmp_path / "doubled"))
    assert not Reference(doubled, processor, cpu).compare(samples, replies).close(0.015)
    cut = [Reply("", replies[0].prompt[1:], (7,), (0.0,), ({},)), *replies[1:]]
    assert "prompts differ" in reference.prompt_problems(samples, cut)[0]


def small_float16_model(folder: Path, factor: int = 2**11) -> Path:
    """The demo model in float16: linears after a norm are `factor` times smaller, and the norms as much larger."""
    source = MODELS["demo-llava"]
    shutil.copytree(source, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    for name in tensors:
        if re.search(r"layers\.\d+\.(input|post_attention)_layernorm\.weight", name):
            tensors[name] *= factor
        elif re.search(r"layers\.\d+\..*\.(q|k|v|gate|up)_proj\.weight", name) and name.startswith("language"):
            tensors[name] /= factor
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"bfloat16"', '"float16"'))
    return folder


FAST_SCALES = {("compressed_tensors", "float16")}


@pytest.mark.parametrize(
    ("format_name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in FAST_SCALES else pytest.mark.slow)
        for name in RULES
        for dtype in ("float16", "bfloat16")  # of an engine on a GPU, and on a CPU
    ],
)
def test_scales_below_the_normal_numbers_of_float16_are_checked_like_others(
    format_name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An engine that computes with them passes, and one that takes them for zero does not."""
    out, _ = exported(tmp_path / "artifact", format_name, str(small_float16_model(tmp_path / "model")))
    artifact, processor, cpu = Artifact.open(out), load_processor(out), choose("cpu")
    names = [f"{m}.{name}" for m in artifact.manifest.linears for name in ("weight_scale", "scales")]
    scales = {name: artifact.checkpoint.read(name) for name in names if name in artifact.checkpoint.tensors}
    tiny = [name for name, scale in scales.items() if scale.dtype == torch.float16 and (scale < SMALLEST_NORMAL).all()]
    assert len(tiny) == 2 * 5
    assert all((scales[name] > 0).all() for name in tiny)
    for hardware in ((8, 0), (9, 0)):
        refuse_unservable(artifact, hardware, 1)
    monkeypatch.setattr(reference, "engine_dtype", lambda config, cpu: dtype)
    samples = questions(out, (), 2)
    whole = Reference(artifact, processor, cpu)
    replies = replies_of(whole, artifact, processor, samples)
    compared = whole.compare(samples, replies)
    assert compared.distance.largest < 1e-6
    assert 0 < compared.floor.mean < 1
    assert compared.close(0.015)
    tensors = load_file(out / "model.safetensors")
    save_file(tensors | {name: tensors[name] * 0 for name in tiny}, out / "model.safetensors", {"format": "pt"})
    flushed = Reference(Artifact.open(out), processor, cpu)
    lost = replies_of(flushed, artifact, processor, samples)
    (problem,) = distance_problems(whole.compare(samples, lost), None, 0.015)
    assert "log-probabilities are too far from the reference" in problem


def test_a_reply_is_compared_up_to_the_placeholder_of_a_picture():
    reply = Reply("", (1,), (7, 5, 5, 8), (-1.0, -2.0, -3.0, -4.0), ({}, {1: -9.0}, {}, {}))
    cut = before_placeholder(reply, 5)
    assert listed_tokens(cut) == [(0, 7, -1.0), (1, 1, -9.0), (1, 5, -2.0)]
    assert before_placeholder(reply, None) == before_placeholder(reply, 6) == reply


def test_a_control_without_effect_is_a_problem():
    near, far, floor = Distance(0.02, 0.005, 50), Distance(4.0, 1.0, 50), Distance(0.02, 0.005, 50)
    good = EngineComparison(near, floor)
    assert distance_problems(good, Control("vision", far, good), 0.015) == []
    assert "cannot detect an error" in distance_problems(good, Control("vision", near, good), 0.015)[0]
    assert "on both sides" in distance_problems(good, Control("vision", far, EngineComparison(far, floor)), 0.015)[0]
    assert "too far" in distance_problems(EngineComparison(far, floor), None, 0.015)[0]


@pytest.mark.parametrize(
    ("largest", "mean", "passes"),
    [(1.99, 0.139, True), (2.01, 0.139, False), (1.99, 0.141, False)],  # of a floor of 1.0 at most and 0.1 on average
)
def test_both_the_largest_and_the_mean_difference_are_bounded(largest: float, mean: float, passes: bool):
    floor = Distance(1.0, 0.1, 50)
    comparison = EngineComparison(Distance(largest, mean, 50), floor)
    assert comparison.close(0.015) is passes
    assert (distance_problems(comparison, None, 0.015) == []) is passes
    assert EngineComparison(Distance(0.06, 0.015, 50), Distance(0.0, 0.0, 50)).close(0.015)  # what is always allowed
    moved = [Distance(9.0, 0.14 * times, 50) for times in (4.9, 5.1)]
    good = EngineComparison(floor, floor)
    assert [len(distance_problems(good, Control("vision", each, good), 0.015)) for each in moved] == [1, 0]


def test_the_result_is_written_into_the_report(folder: Path, tmp_path: Path):
    write_report(tmp_path, crafted(1, 1), None)
    shutil.copy(folder / "mmq_manifest.json", tmp_path)
    store_result(
        tmp_path,
        CheckResult("0.32.0+cpu", "cpu", 8, 0.015, None, None, {"A": 2}, ("K for A",), 30.0, ("why",)),
        "0" * 64,
    )
    report = json.loads((tmp_path / "mmq_report.json").read_text())
    assert report["passed"] is True
    assert report["serving"]["passed"] is False
    assert report["serving"]["problems"] == ["why"]
    manifest = json.loads((tmp_path / "mmq_manifest.json").read_text())
    verdict = {"engine": "vllm 0.32.0+cpu", "build": "cpu", "passed": False}
    assert manifest == json.loads((folder / "mmq_manifest.json").read_text()) | {"serving": verdict}


def test_the_page_of_a_check_lists_schemes_and_kernels():
    result = CheckResult("0.32.0", "cuda", 8, 0.015, None, None, {"B": 1, "A": 2}, ("K for A",), 30.4, ())
    assert checked_page(result).splitlines() == [
        "vllm 0.32.0, ready after 30 s, answered 8 questions",
        "2 linears run as A according to vLLM's log",
        "1 linears run as B according to vLLM's log",
        "kernel K for A",
        "passed",
    ]


def test_the_page_of_a_check_gives_differences_beside_those_that_are_allowed():
    floor = Distance(0.5, 0.0625, 100)
    compared, restored = (EngineComparison(Distance(0.75, mean, 100), floor) for mean in (0.03125, 0.046875))
    control = Control("vision", Distance(8.0, 2.5, 100), restored)
    result = CheckResult("0.32.0", "cuda", 8, 0.015, compared, control, {}, (), 30.4, ("why",))
    assert checked_page(result).splitlines()[1:] == [
        "log-probabilities against the dequantized reference, 100 tokens: "
        "mean difference 0.0312 (allowed 0.0875), largest 0.7500 (allowed 1.0000)",
        "16-bit rounding of the reference alone: mean 0.0625, largest 0.5000",
        "control, scales of vision doubled: mean 2.5000, largest 8.0000; against a reference with the same scales: "
        "mean 0.0469 (16-bit rounding alone 0.0625)",
        "FAILED",
    ]


def test_pictures_are_sent_without_loss(folder: Path):
    import io

    from PIL import Image, ImageChops

    sample = questions(folder, (), 1)[0]
    sent = Image.open(io.BytesIO(png(sample.image())))
    assert ImageChops.difference(sent, sample.image().convert("RGB")).getbbox() is None


@pytest.mark.parametrize(
    ("gpu_gib", "host_gib", "place", "dtype"),
    [
        (80, 64, "cuda", torch.float32),
        (24, 64, "cuda", torch.float16),  # 26.3 GiB in float32, 13.2 in 16 bits
        (8, 64, "cpu", torch.float32),
        (8, 20, "cpu", torch.bfloat16),
        (8, 12, None, None),
    ],
)
def test_the_reference_of_a_7b_counts_weights_and_not_packed_words(
    gpu_gib: int, host_gib: int, place: str | None, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = SimpleNamespace(config={"dtype": "float16"})
    artifact = cast(Artifact, SimpleNamespace(parameters=lambda: 7_063_427_072, checkpoint=checkpoint))
    gpu = Device("cuda:0", "GPU", gpu_gib * 2**30)
    monkeypatch.setattr(reference, "choose", lambda name: Device("cpu", "CPU", host_gib * 2**30))
    if place is None:
        with pytest.raises(ServeError, match=r"needs 16\.4 GiB; free memory: 8\.0 GiB on GPU and 12\.0 GiB on CPU"):
            reference.reference_placements(artifact, gpu)
    else:
        device, chosen_dtype = reference.reference_placements(artifact, gpu)[0]
        assert (device.torch_device.type, chosen_dtype) == (place, dtype)


@pytest.mark.parametrize("scheme", [*NARROW, *BLOCKS, Scheme(4, 32)], ids=Scheme.label)
def test_doubled_scales_double_the_weight_in_every_layout(scheme: Scheme) -> None:
    module, linear = FORMATS["compressed_tensors"], random_linear(scheme, 128, 128)
    stored = module.pack("x", linear)
    doubled = {name: doubled_scale(t) if name.removeprefix("x.") in SCALES else t for name, t in stored.items()}
    assert torch.equal(module.unpack("x", doubled, scheme).dequantize(), 2 * linear.dequantize())


@pytest.mark.parametrize(
    ("stored", "doubled"),
    [
        (torch.tensor([3, 127], dtype=torch.uint8), [4, 128]),  # exponents of 2
        (torch.tensor([6.0]), [3.0]),  # a divisor
        (torch.tensor([[6.0]]), [[12.0]]),  # the scale of one row
        (torch.tensor([6.0, 2.0]), [12.0, 4.0]),
        (torch.tensor([6.0], dtype=torch.bfloat16), [12.0]),
        (torch.tensor([6.0], dtype=torch.float8_e4m3fn), [6.0]),  # its divisor changes
    ],
)
def test_a_doubled_scale_depends_on_its_kind(stored: torch.Tensor, doubled: list[Any]) -> None:
    result = doubled_scale(stored)
    assert result.dtype == stored.dtype
    assert result.float().tolist() == doubled
