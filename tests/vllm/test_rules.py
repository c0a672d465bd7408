"""Serve-lint beside vLLM's own functions: matching on the patterns of every recipe and on broken ones, and kernels."""

import json
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact.artifact_config import groups, kept_modules
from exporter.device import Device
from exporter.formats.compressed_tensors import quantization_config, supports
from exporter.formats.config_group import ConfigGroup
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import engine_linears, make_plan
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.planning.tensor_parallel import ROW_PARALLEL, parallel_problems, shard
from exporter.planning.vllm_kernels import (
    ARCHITECTURES,
    FP8_CUTLASS,
    FP8_MARLIN,
    HUMMING,
    INT8_CUTLASS,
    MACHETE,
    MARLIN,
    W4A8_CUTLASS,
    serving_kernels,
)
from exporter.planning.vllm_rules import Linear, cpu_problems, gpu_problems, matched_scheme

H100 = Device("cuda:0", "H100", 78 * 2**30)
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BREAKS = (  # pattern of a recipe -> a pattern that a person might have written
    lambda target: target.replace("re:.*", "re:^model\\."),
    lambda target: target.replace("q_proj|", ""),
    lambda target: target.replace("|self_attn\\.qkv_proj", ""),
    lambda target: target.replace("vision_tower", "vision_model"),
    lambda target: "re:.*[kv]_proj$",
    lambda target: target.removesuffix("$").replace("mlp", "m"),
)


def run_script(python: str, questions: list[dict], script: str = "match.py") -> list[str | None]:
    """vLLM's answers."""
    command = [python, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "model", "least"),
    [("llava", "llava-hf/llava-1.5-7b-hf", 5000), ("blip2", "Salesforce/blip2-opt-2.7b", 3000)],
)
def test_matching_agrees_with_vllm(
    kind: str, model: str, least: int, engine_python: str, sparse_checkpoint: Callable[[str], Path]
):
    family = FAMILIES[kind]
    checkpoint = Checkpoint.open(sparse_checkpoint(model.replace("/", "--")), family.canonical_name)
    questions, expected = [], []
    for recipe in [model_recipe for model_recipe in map(load_recipe, built_in()) if model_recipe.model.repo == model]:
        plan = make_plan(recipe, checkpoint, family, H100)
        model_recipe = [(group.scheme, list(group.targets)) for group in groups(plan)]
        ignored = kept_modules(plan)
        for change in (lambda target: target, *BREAKS):
            changed = [(scheme, [change(target) for target in targets]) for scheme, targets in model_recipe]
            members: dict[str, list[str]] = {}
            for linear in engine_linears(plan.rows, family):
                members.setdefault(linear.engine, []).append(linear.name)
            for engine, names in members.items():
                targets = [target for _, listed in changed for target in listed]
                questions.append({"engine": engine, "targets": targets, "ignore": ignored, "fused": FUSED})
                expected.append((matched_scheme(engine, names, changed, ignored), dict(_by_target(changed))))
    answers = run_script(engine_python, questions)
    assert len(answers) > least
    assert len({str(answer) for answer in answers}) > 5
    for question, (expected_scheme, by_target), actual in zip(questions, expected, answers, strict=True):
        assert expected_scheme == (by_target[actual] if actual else None), (
            question["engine"],
            question["targets"],
            actual,
        )


GROUPS = (16, 32, 64, 128, 256, "row", "tensor")
SCHEMES = [
    *(Scheme(bits, group, even) for bits in range(2, 9) for group in GROUPS for even in (True, False)),
    Scheme(8, "row", activations="int8"),
    Scheme(8, "row", number="fp8", activations="fp8"),
    Scheme(8, "row", number="fp8"),
    Scheme(4, 128, activations="fp8"),
]
CLASSES = {
    MACHETE: "MacheteLinearKernel",
    MARLIN: "MarlinLinearKernel",
    HUMMING: "HummingLinearKernel",
    FP8_CUTLASS: "CutlassFP8ScaledMMLinearKernel",
    FP8_MARLIN: "MarlinFP8ScaledMMLinearKernel",
    INT8_CUTLASS: "CutlassInt8ScaledMMLinearKernel",
    W4A8_CUTLASS: "CutlassW4A8LinearKernel",
}


CPU_CLASSES = {
    "CPU WNA16": "CPUWNA16LinearKernel",
    "oneDNN int8": "CPUInt8ScaledMMLinearKernel",
    "torch fallback": "ChannelWiseTorchFP8ScaledMMLinearKernel",
}


def question(linear: Linear, **changed: Any) -> dict:
    """The question to choose.py about one linear of an artifact; on a CPU by default."""
    config = quantization_config([ConfigGroup(linear.scheme, ("re:.*x$",))], [])
    rest = {"capability": None, "degree": 1, "dtype": "bfloat16", "humming": False, **changed}
    return {"config": config, "shape": linear.shape, "row_parallel": linear.name in ROW_PARALLEL, **rest}


def test_shapes_of_4_bits_with_float8_inputs_are_refused_as_vllm_does(engine_python: str):
    scheme, card = Scheme(4, 128, activations="fp8"), (9, 0)
    sides = [(1408, 6144), (11008, 4096), (640, 128), (4096, 4096)]
    combinations = [(Linear("up_proj", "up_proj", shape, scheme), degree) for shape in sides for degree in (1, 2, 4)]
    questions = [question(linear, degree=degree, capability=card) for linear, degree in combinations]
    answers = run_script(engine_python, questions, "choose.py")
    for (linear, degree), answer in zip(combinations, answers, strict=True):
        problems = gpu_problems([shard(linear, degree)], "compressed_tensors", card)
        assert bool(problems) == answer.startswith("error: "), (linear, degree, problems, answer)
    assert {answer.startswith("error: ") for answer in answers} == {True, False}


@pytest.mark.parametrize("humming", [False, True])
def test_kernels_of_every_architecture_are_those_that_vllm_chooses(engine_python: str, humming: bool):
    combinations = [(scheme, card) for scheme in SCHEMES for card in ARCHITECTURES]
    linears = [(Linear("up_proj", "up_proj", (4096, 4096), scheme), card) for scheme, card in combinations]
    questions = [question(linear, capability=card, humming=humming) for linear, card in linears]
    for (scheme, card), answer in zip(combinations, run_script(engine_python, questions, "choose.py"), strict=True):
        kernels = [
            kernel for kernel in serving_kernels(scheme, "compressed_tensors").cuda if humming or not kernel.package
        ]
        if humming and card == (9, 0) and MARLIN in kernels:  # there 0.32 takes Humming first
            kernels.remove(MARLIN)
        expected = next((kernel for kernel in kernels if kernel.runs_on(card)), None)
        case = (scheme.label(), card, answer)
        if scheme.activations == "int8" and card >= (10, 0):
            assert expected is None, case  # the compiled half refuses it at the first request, vLLM's choice does not
        elif answer == "TritonW4A16LinearKernel":
            assert expected in (None, HUMMING), case  # named nowhere: it is the last that vLLM tries
        elif expected is None:
            assert answer.startswith("error: "), case
        else:
            assert answer == CLASSES[expected], case


def test_what_a_cpu_or_several_devices_refuse_is_what_vllm_refuses(engine_python: str):
    schemes = [*(Scheme(4, group) for group in (32, 64, 128, "row")), Scheme(8, 128)]
    schemes += [Scheme(8, "row", activations="int8"), Scheme(4, 128, activations="fp8")]
    shapes = [(256, 256), (96, 160), (100, 160), (96, 100), (256, 1408), (512, 11008), (2560, 2560), (1000, 4096)]
    shapes += [(1280, 3420), (3420, 1280), (1152, 4304), (4304, 1152)]  # towers of Qwen2.5-VL and SigLIP so400m
    combinations = [
        (Linear(name, name, shape, scheme), degree)
        for degree, name, scheme, shape in product((1, 2, 4), ("down_proj", "up_proj"), schemes, shapes)
        if supports(scheme, shape[1], shape[0]) is None and shape[name == "down_proj"] % degree == 0
    ]
    combinations += [(Linear("up_proj", "up_proj", (4096, 4096), scheme), 1) for scheme in SCHEMES]
    answers = run_script(
        engine_python, [question(linear, degree=degree) for linear, degree in combinations], "choose.py"
    )
    for (linear, degree), answer in zip(combinations, answers, strict=True):
        problems = parallel_problems([linear], degree) + cpu_problems([shard(linear, degree)], "compressed_tensors")
        assert bool(problems) == answer.startswith("error: "), (linear, degree, problems, answer)
        if not problems:
            assert answer == CPU_CLASSES[serving_kernels(linear.scheme, "compressed_tensors").cpu], (linear, answer)
    assert {answer.startswith("error: ") for answer in answers} == {True, False}


def test_words_that_vllm_cannot_load_are_refused(engine_python: str):
    """By vLLM's own parameters and Marlin's padding: 4-bit rows of 3,420, and zero points of fused odd outputs."""
    rows, columns = [(3420, 3420), (3456, 3456), (1280,), (1152,), (4304,), (96, 100)], (1280, 3420, 3456, 4304)
    schemes = [Scheme(4, "row"), Scheme(4, "row", symmetric=False), Scheme(8, "row")]  # those of Marlin
    questions, expected = [], []
    for members, inputs, scheme in product(rows, columns, schemes):
        linears = [Linear(f"{i}.x", "x", (count, inputs), scheme) for i, count in enumerate(members)]
        problems = " ".join(gpu_problems(linears, "compressed_tensors", (8, 0)))
        expected.append(("zeros" if "zero points" in problems else "words") if problems else "ok")
        config = quantization_config([ConfigGroup(scheme, ("re:.*x$",))], [])
        size = {"bits": scheme.bits, "rows": members, "columns": inputs, "capability": (8, 0)}
        questions.append({"config": config, **size})
    assert run_script(engine_python, questions, "load.py") == expected
    assert set(expected) == {"ok", "words", "zeros"}


def test_devices_load_whole_words_of_their_inputs(engine_python: str):
    """A ViT of Qwen2.5-VL with 3,420 inputs in 8 bits: two devices would have 427.5 words each."""
    questions, expected = [], []
    for columns, degree, bits in product((1280, 3420, 3424, 4304, 2568), (1, 2, 4), (4, 8)):
        scheme = Scheme(bits, "row")
        if columns * bits % 32 == 0:
            problems = parallel_problems([Linear("down_proj", "down_proj", (128, columns), scheme)], degree)
            expected.append("shards" if problems else "ok")
            config = quantization_config([ConfigGroup(scheme, ("re:.*x$",))], [])
            size = {"bits": bits, "rows": (128,), "columns": columns, "degree": degree, "capability": (9, 0)}
            questions.append({"config": config, **size})
    assert run_script(engine_python, questions, "load.py") == expected
    assert set(expected) == {"ok", "shards"}


def _by_target(schemes: list[tuple[Scheme, list[str]]]) -> list[tuple[str, Scheme]]:
    """Target -> its scheme; the first wins, as in vLLM's map from targets."""
    return [(target, scheme) for scheme, targets in reversed(schemes) for target in reversed(targets)]
