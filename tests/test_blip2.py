"""BLIP-2 from folder to artifact: every component by every method, stored as the recipe says, opened by others."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact
from exporter.artifact.artifact_config import groups, kept_modules
from exporter.commands.main import cli
from exporter.commands.plan_tables import plan_notes
from exporter.data.demo.samples import samples
from exporter.data.tasks import TASKS
from exporter.data.tasks.sample import Sample, task_of
from exporter.device import Device, choose
from exporter.dtypes import BFLOAT16, FLOAT16
from exporter.errors import CheckpointError, PlanError, ServeError
from exporter.events import Event
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family
from exporter.model.inference.encoding import render, reply_end
from exporter.model.inference.predict import Predictor, batches, prompt_inputs
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.model.stream import load_whole
from exporter.pipeline.export import Export, export
from exporter.planning.plan import Plan, engine_linears, make_plan
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.planning.vllm_rules import pattern_problems
from exporter.publishing import card_serving
from exporter.publishing.artifact_summary import read_place
from exporter.serving.preflight import refuse_unservable
from tests.children import killed_after
from tests.slow import some, some_of
from tests.test_calibrate import batches_for, plan_for, streamed, tiny_checkpoint
from tests.tiny_blip2 import write_tiny_blip2
from tests.tiny_models import QUICK

BLIP2, ITM = FAMILIES["blip2"], FAMILIES["blip2-itm"]
H100 = Device("cuda:0", "H100", 78 * 2**30)
OPT_27B, ITM_COCO = "Salesforce--blip2-opt-2.7b", "Salesforce--blip2-itm-vit-g-coco"
both = pytest.mark.parametrize("family", [BLIP2, ITM], ids=["blip2", "blip2-itm"])


def rules_for(family: Family, method: str = "gptq", bits: int = 4, group_size: Any = 16) -> list[dict[str, Any]]:
    """One rule for every component; what the engine cannot load packed is stored dequantized."""
    rule = {"method": method, "bits": bits, "group_size": group_size, "options": QUICK[method]}
    store = {component.name: "dequantized" if component.unpackable else "packed" for component in family.components}
    return [{"component": name, "store": how, **rule} for name, how in store.items()]


def recipe_for(family: Family, repo: Path, **changes: Any) -> Recipe:
    """A recipe on a few drawings with every component quantized, and a gate on the family's main task."""
    task = family.tasks[0]
    data: dict[str, Any] = {
        "name": "tiny",
        "summary": "tiny",
        "model": {"repo": str(repo), "family": family.name},
        "quantize": rules_for(family),
        "calibration": {"data": "demo", "tasks": ["captioning"], "samples": 6, "batch": 3},
        "gates": [{"task": task, "metric": TASKS[task].METRICS[0], "max_drop": 0.5}],
        "evidence": [{"finding": "none", "figures": "0", "source": "none"}],
    }
    return Recipe.model_validate(data | changes)


def quick_export(recipe: Recipe, out: Path, on_event: Callable[[Event], None] = lambda event: None, **more: Any) -> Any:
    """An export without evaluation: these models are random."""
    return export(recipe, out=out, device=choose("cpu"), on_event=on_event, skip_evaluation=True, **more)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family.name: write_tiny_blip2(root / family.name, family) for family in (BLIP2, ITM)}


@pytest.fixture(scope="module")
def rounded(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """An export of each model with every component rounded to nearest."""
    root = tmp_path_factory.mktemp("rounded")
    return {
        family.name: quick_export(
            recipe_for(family, models[family.name], quantize=rules_for(family, "rtn")), root / family.name
        )
        for family in (BLIP2, ITM)
    }


@both
def test_every_component_rounded_to_nearest_is_what_transformers_opens(
    family: Family, models: dict[str, Path], rounded: dict[str, Export]
) -> None:
    """GPTQ and AWQ: `test_conformance.py`."""
    done = rounded[family.name]
    if find_spec("compressed_tensors"):
        assert done.verified.block_difference == pytest.approx(0, abs=1e-4)
    artifact = Artifact.open(done.out)
    source = Checkpoint.open(models[family.name])
    packed = set(artifact.manifest.linears)
    for component in family.components:
        for i in range(component.used(source.config)):
            for linear in component.linears_of(source.config, i):
                module = component.module(i, linear)
                assert (module in packed) == (component.unpackable is None), module
                assert not torch.equal(artifact.read(f"{module}.weight"), source.read(f"{module}.weight").float())
    assert set(artifact.names()) == set(source.tensors)


@both
def test_logits_move_with_the_weights_of_every_component(family: Family, models: dict[str, Path]) -> None:
    """What `verify` compares must depend on all of them, or its zero proves nothing."""
    checkpoint = Checkpoint.open(models[family.name])
    (inputs,) = batches(load_processor(models[family.name]), family, samples(family.tasks[0], "test", 2, 0), 2)

    def outputs(doubled: str) -> torch.Tensor:
        def read(name: str) -> torch.Tensor:
            return checkpoint.read(name).float() * (2 if name == f"{doubled}.weight" else 1)

        names = list(checkpoint.tensors)
        model = load_whole(family, checkpoint.config, names, read, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            return family.outputs(model, inputs)

    plain = outputs("")
    assert torch.equal(plain, outputs(""))
    for component in family.components:
        last = component.used(checkpoint.config) - 1
        for linear in component.linears_of(checkpoint.config, last):
            moved = float((outputs(component.module(last, linear)) - plain).abs().max())
            assert moved > 1e-4 or linear.endswith("attention.key"), (component.name, linear)


@pytest.mark.skipif(not find_spec("compressed_tensors"), reason="transformers reads packed weights with it")
@pytest.mark.parametrize(("family", "dtype"), [(BLIP2, torch.float32), (ITM, torch.float16)])
def test_transformers_loads_artifacts_of_other_dtypes(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_tiny_blip2(tmp_path / "model", family, dtype)
    done = quick_export(recipe_for(family, folder, quantize=rules_for(family, "rtn", 8)), tmp_path / "out")
    assert done.verified.block_difference == pytest.approx(0, abs=1e-4)


def test_dequantized_parts_of_a_float32_model_take_16_bits(tmp_path: Path) -> None:
    folder = write_tiny_blip2(tmp_path / "model", BLIP2, torch.float32)
    done = quick_export(recipe_for(BLIP2, folder), tmp_path / "out")
    stored = Checkpoint.open(tmp_path / "out").tensors
    for row in done.plan.rows:
        if row.decision == "dequantized":
            assert stored[row.tensor.name].dtype == BFLOAT16
            assert row.bytes_after == 2 * row.tensor.size
    assert done.plan.bytes_after == sum(info.bytes for info in stored.values())


@pytest.mark.parametrize("family", some_of({"blip2": (BLIP2,), "blip2-itm": (ITM,)}, ["blip2"]))
def test_killed_in_every_component_and_resumed_is_byte_identical(
    family: Family, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(family, models[family.name], quantize=rules_for(family, "awq"))
    done = quick_export(recipe, tmp_path / "whole")
    ends = [unit.index + 1 for unit in done.plan.units[1::2]]
    for unit in ends:
        killed_after(unit, quick_export, recipe, tmp_path / "resumed", work=tmp_path / "work")
    quick_export(recipe, tmp_path / "resumed", work=tmp_path / "work")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_feed_forward_of_retrieval_has_seen_its_own_inputs(tmp_path: Path) -> None:
    """GPTQ's error report is relative to what a linear really received; without inputs it would be nothing."""
    checkpoint = tiny_checkpoint(tmp_path / "model", ITM)
    plan = plan_for(checkpoint, (Rule(component="qformer", method="gptq", bits=3, group_size=16),), ITM)
    workdir = streamed(plan, checkpoint, tmp_path / "work", batches_for(ITM))
    for unit in plan.units:
        errors = workdir.read(unit).errors
        assert len(errors) == len(unit.rows)
        assert all(0.01 < error < 0.6 for error in errors.values()), errors


def big(name: str, family: Family, sparse: Callable[[str], Path]) -> Checkpoint:
    """A real checkpoint's headers."""
    return Checkpoint.open(sparse(name), family.canonical_name)


def plan_of(checkpoint: Checkpoint, family: Family, rules: list[dict[str, Any]] | None = None) -> Plan:
    """The plan for groups of 128, as on real models."""
    final_rules = rules or rules_for(family, group_size=128)
    return make_plan(recipe_for(family, checkpoint.folder, quantize=final_rules), checkpoint, family, H100)


@pytest.mark.parametrize(
    ("name", "family", "counts"),
    [
        (
            OPT_27B,
            BLIP2,
            {"vision": 984_023_040, "qformer": 104_988_672, "projector": 1_966_080, "language": 2_516_582_400},
        ),
        (ITM_COCO, ITM, {"vision": 984_023_040, "qformer": 161_611_776}),
    ],
    ids=["opt-2.7b", "itm-coco"],
)
def test_published_counts_of_what_is_quantized(
    name: str, family: Family, counts: dict[str, int], sparse_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = big(name, family, sparse_checkpoint)
    plan = plan_of(checkpoint, family)
    assert [row.tensor.name for row in plan.rows] == list(checkpoint.tensors)
    totals = {
        component.name: sum(row.tensor.size for row in plan.of(component.name) if row.decision != "kept")
        for component in family.components
    }
    assert totals == counts
    assert all(row.reason or row.decision == "packed" for row in plan.rows)
    for component in family.components:
        how = {row.decision for row in plan.of(component.name) if row.rule}
        assert how == {"dequantized" if component.unpackable else "packed"}


NO_WARNING = {"blip2": 0, "blip2-itm": 1}  # that nothing serves retrieval is one


@pytest.mark.parametrize("name", [name for name in built_in() if name.startswith("blip2")])
def test_every_recipe_fits_its_true_model(name: str, sparse_checkpoint: Callable[[str], Path]) -> None:
    recipe = load_recipe(name)
    folder = sparse_checkpoint(recipe.model.repo.replace("/", "--"))
    checkpoint, family = open_source(str(folder), dtype=recipe.model.dtype)
    plan = make_plan(recipe, checkpoint, family, H100)
    assert len(plan.warnings) == NO_WARNING[family.name] or "w3" in name
    assert plan.bytes_before == 2 * plan.parameters
    assert all(row.reason or row.decision == "packed" for row in plan.rows)
    linears, schemes = engine_linears(plan.rows, family), [(group.scheme, group.targets) for group in groups(plan)]
    assert pattern_problems(linears, schemes, kept_modules(plan)) == []
    dequantized = {row.component for row in plan.rows if row.decision == "dequantized"}
    assert dequantized <= {component.name for component in family.components if component.unpackable}


def test_the_models_beside_those_of_the_recipes_can_be_planned(sparse_checkpoint: Callable[[str], Path]) -> None:
    large = plan_of(big("Salesforce--blip2-opt-6.7b", BLIP2, sparse_checkpoint), BLIP2)
    assert sum(row.tensor.size for row in large.of("language") if row.decision == "packed") == 6_442_450_944
    early = plan_of(big("Salesforce--blip2-itm-vit-g", ITM, sparse_checkpoint), ITM)
    assert len(early.units) == 39 + 12


def test_a_packed_q_former_is_refused_with_what_to_do(sparse_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = big(OPT_27B, BLIP2, sparse_checkpoint)
    with pytest.raises(PlanError, match=r"'qformer': vLLM .*plain linears.*`store: dequantized`"):
        plan_of(checkpoint, BLIP2, [{"component": "qformer", "bits": 8}])


FLAN_T5_XL = {  # the text model of Salesforce/blip2-flan-t5-xl
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 5120,
    "d_kv": 64,
    "d_model": 2048,
    "is_encoder_decoder": True,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 32,
    "num_layers": 24,
    "vocab_size": 32128,
}


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("Blip2ForConditionalGeneration", "its language model is t5, but mmq supports BLIP-2 only with OPT: vLLM"),
        ("InstructBlipForConditionalGeneration", "vLLM has no InstructBLIP, and its processor needs a second token"),
    ],
)
def test_models_with_flan_t5_and_instructblip_are_refused_at_plan_with_the_reason(
    architecture: str, reason: str, sparse_checkpoint: Callable[[str], Path]
) -> None:
    folder = sparse_checkpoint(OPT_27B)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [architecture], "use_decoder_only_language_model": False, "text_config": FLAN_T5_XL}
    (folder / "config.json").write_text(json.dumps(config))
    refused = CliRunner().invoke(cli, ["plan", "--recipe", "blip2-caption-w4", "--model", str(folder)])
    assert refused.exit_code == 1
    assert reason in " ".join(refused.output.split())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_engine_gives_every_linear_its_scheme(bits: int, sparse_checkpoint: Callable[[str], Path]) -> None:
    plan = plan_of(big(OPT_27B, BLIP2, sparse_checkpoint), BLIP2, rules_for(BLIP2, "rtn", bits, 128))
    linears = engine_linears(plan.rows, BLIP2)
    assert linears[0].name == ".encoder.layers.0.self_attn.qkv"  # the engine's tower has no name of its own
    assert {schemes.engine.rpartition(".")[2] for schemes in linears if "decoder" in schemes.name} == {
        "qkv_proj",
        "out_proj",
        "fc1",
        "fc2",
    }
    schemes = [(group.scheme, group.targets) for group in groups(plan)]
    assert len(schemes) == 1
    assert pattern_problems(linears, schemes, kept_modules(plan)) == []
    off = [(scheme, [target.replace(r"(?:vision_model)?\.?", "") for target in targets]) for scheme, targets in schemes]
    assert pattern_problems(linears, off, kept_modules(plan))


def test_a_retrieval_plan_says_that_no_engine_serves_it(sparse_checkpoint: Callable[[str], Path]) -> None:
    plan = plan_of(big(ITM_COCO, ITM, sparse_checkpoint), ITM, rules_for(ITM, "gptq", 3, 128))
    assert "vLLM does not support image-text retrieval" in plan.warnings[0]
    assert not any("humming" in warning for warning in plan.warnings)
    heads = {row.module: row.reason for row in plan.rows if row.module.endswith(("_projection", "itm_head"))}
    assert heads.keys() == {"vision_projection", "text_projection", "itm_head"}
    assert all("16 bits" in reason for reason in heads.values())


def test_replies_end_as_the_family_does(models: dict[str, Path]) -> None:
    class Words:
        """A tokenizer that knows the line break, as OPT's does."""

        eos_token, eos_token_id, unk_token_id = "</s>", 2, 3

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [50118] if text == "\n" else []}

    assert reply_end(Words(), BLIP2) == ("\n", [2, 50118])
    assert reply_end(Words(), FAMILIES["llava"]) == ("</s>", [2])
    assert reply_end(Words(), ITM) == ("", [2])
    demo = load_processor(models["blip2"]).tokenizer
    assert reply_end(demo, BLIP2) == ("</s>", [demo.eos_token_id])


def test_texts_to_calibrate_retrieval_on_are_those_that_are_searched_for(models: dict[str, Path]) -> None:
    caption = Sample("1", lambda: Image.new("RGB", (8, 8)), None, ("A large Cross.",))
    processor = load_processor(models["blip2-itm"])
    assert render(processor, ITM, caption, caption.references[0]) == "a large cross"
    assert render(processor, BLIP2, caption, caption.references[0]) == "A large Cross.</s>"


def test_config_of_the_artifact_names_what_is_packed_and_nothing_else(rounded: dict[str, Export]) -> None:
    config = json.loads((rounded["blip2"].out / "config.json").read_text())["quantization_config"]
    ignored = set(config["ignore"])
    assert {"language_projection", "language_model.lm_head"} <= ignored | {"language_model.lm_head"}
    assert "qformer.encoder.layer.0.crossattention.attention.key" in ignored
    assert not any("encoder.layers" in name for name in ignored)


def test_float32_is_read_as_16_bits_on_request(tmp_path: Path) -> None:
    folder = write_tiny_blip2(tmp_path / "model", BLIP2, torch.float32)
    model = {"repo": str(folder), "family": "blip2", "dtype": "float16"}
    done = quick_export(recipe_for(BLIP2, folder, model=model), tmp_path / "out")
    stored, source = Checkpoint.open(tmp_path / "out"), Checkpoint.open(folder)
    floats = {info.dtype for info in stored.tensors.values() if info.dtype.is_floating_point}
    assert floats == {FLOAT16}
    assert stored.config["dtype"] == "float16"
    assert done.plan.bytes_before == 2 * done.plan.parameters
    assert done.plan.bytes_after == sum(info.bytes for info in stored.tensors.values())
    for row in done.plan.rows:
        if row.decision == "kept":
            assert torch.equal(stored.read(row.tensor.name), source.read(row.tensor.name).half()), row.tensor.name
    if find_spec("compressed_tensors"):
        assert done.verified.block_difference == pytest.approx(0, abs=1e-4)


def test_answers_are_those_of_one_token_at_a_time(models: dict[str, Path]) -> None:
    """Captions without a prompt and questions of several lengths, in one padded batch, against whole passes alone."""
    checkpoint, processor = Checkpoint.open(models["blip2"]), load_processor(models["blip2"])
    names, config = list(checkpoint.tensors), checkpoint.config
    model = load_whole(BLIP2, config, names, checkpoint.read, torch.device("cpu"), torch.float32)
    mixed_samples = samples("captioning", "test", 3, 0) + samples("vqa", "test", 5, 0)
    answers = Predictor(model, processor, BLIP2, torch.device("cpu"), 8).answer(mixed_samples)
    assert len(set(answers)) > 3
    for sample, answer in zip(mixed_samples, answers, strict=True):
        inputs = prompt_inputs(processor, BLIP2, sample)
        start, longest = inputs["input_ids"].shape[1], BLIP2.max_new_tokens[task_of(sample)]
        assert inputs["input_ids"][0].tolist().count(config["image_token_index"]) == config["num_query_tokens"]
        for _ in range(longest):
            with torch.no_grad():
                token = model(**inputs).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if int(token) == processor.tokenizer.eos_token_id:
                break
        text = processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)
        assert answer == text.strip(), sample.identity


def test_what_the_plan_says_of_parts_that_are_not_served(sparse_checkpoint: Callable[[str], Path]) -> None:
    plan = plan_of(big(OPT_27B, BLIP2, sparse_checkpoint), BLIP2)
    notes = "\n".join(plan_notes(plan))
    assert "qformer: W4 g128, vLLM: quantized values, stored in 16 bits: vLLM" in notes
    assert "plain linears" in notes
    assert "vision: W4 g128, vLLM: Machete" in notes
    retrieval = "\n".join(plan_notes(plan_of(big(ITM_COCO, ITM, sparse_checkpoint), ITM)))
    assert "qformer: W4 g128, transformers: vLLM does not support image-text retrieval" in retrieval
    assert "Machete" not in retrieval


def test_a_retrieval_artifact_is_not_offered_for_serving(rounded: dict[str, Export]) -> None:
    out = rounded["blip2-itm"].out
    with pytest.raises(ServeError, match="vLLM does not support image-text retrieval"):
        refuse_unservable(Artifact.open(out), on=None, tensor_parallel=1)
    section = card_serving.serving("me/mine", read_place(str(out)))
    assert "Blip2ForImageTextRetrieval.from_pretrained(" in section
    assert "vllm serve" not in section


NAN = (
    "vision_model.embeddings.position_embedding",
    "query_tokens",
    "qformer.encoder.layer.2.crossattention.attention.key.weight",
    "qformer.encoder.layer.0.output_query.LayerNorm.bias",
    "language_projection.weight",
    "language_model.model.decoder.final_layer_norm.weight",
)


@pytest.mark.parametrize("name", some(NAN, [NAN[1], NAN[3], NAN[5]]))
def test_a_nan_is_named_wherever_it_is(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["blip2"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*not finite"):
        quick_export(recipe_for(BLIP2, folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
