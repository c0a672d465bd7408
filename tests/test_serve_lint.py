"""vLLM's rules on plain data, and for every shipped recipe on the real 7B header."""

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.artifact.artifact_config import groups, kept_modules
from exporter.device import Device
from exporter.errors import PlanError
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import engine_linears, make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.planning.tensor_parallel import head_problems, input_parts, parallel_problems, shard
from exporter.planning.vllm_kernels import serving_kernels
from exporter.planning.vllm_rules import (
    Linear,
    cpu_problems,
    engine_classes,
    fused_problems,
    gpu_problems,
    hardware_problems,
    kernel_problems,
    lint,
    packing_problems,
    pattern_problems,
    unbuilt_problems,
)
from tests.headers.read import HEADER_NAMES, header_config

W4, W8, A8 = Scheme(4, 128), Scheme(8, "row"), Scheme(8, "row", activations="int8")
H100 = Device("cuda:0", "H100", 78 * 2**30)
BLOCK = "language_model.model.layers.0"


def linear(name: str, scheme: Scheme | None, shape: tuple[int, int] = (256, 256), engine: str = "") -> Linear:
    """A linear of block 0 of the language model."""
    return Linear(f"{BLOCK}.{name}", f"{BLOCK}.{engine or name}", shape, scheme)


def attention(*schemes: Scheme | None) -> list[Linear]:
    """q, k and v with a scheme each."""
    names = ("q_proj", "k_proj", "v_proj")
    pairs = zip(names, schemes, strict=True)
    return [linear(f"self_attn.{name}", scheme, engine="self_attn.qkv_proj") for name, scheme in pairs]


def test_fused_linears_share_a_scheme():
    assert fused_problems(attention(W4, W4, W4)) == []
    assert fused_problems(attention(None, None, None)) == []
    for schemes in ((W4, W4, W8), (W4, None, W4)):
        (problem,) = fused_problems(attention(*schemes))
        assert problem.startswith("rule fused-scheme: ")
        assert "q_proj, k_proj, v_proj" in problem


def test_a_packed_linear_in_a_block_that_never_runs_is_found():
    last = Linear("vision_tower.vision_model.encoder.layers.23.mlp.fc1", "x", (8, 8), W8, built=False)
    assert [p.partition(":")[0] for p in unbuilt_problems([last])] == ["rule unbuilt-block"]
    assert unbuilt_problems([Linear(last.name, "x", (8, 8), None, built=False)]) == []


@pytest.mark.parametrize(
    ("scheme", "format_name", "gpu", "cpu"),
    [
        (W4, "compressed_tensors", True, True),
        (W8, "compressed_tensors", True, False),
        (A8, "compressed_tensors", True, True),
        (Scheme(3, 128), "compressed_tensors", True, False),
        (Scheme(8, "row", number="fp8", activations="fp8"), "compressed_tensors", True, True),
        (Scheme(8, "row", number="fp8"), "compressed_tensors", True, False),
        (Scheme(4, 128, activations="fp8"), "compressed_tensors", True, False),
        (Scheme(4, 128, activations="int8"), "compressed_tensors", False, False),
        (Scheme(3, 128, activations="int8"), "compressed_tensors", True, False),
        (Scheme(8, "block", number="fp8"), "compressed_tensors", False, False),
        (Scheme(8, "block", number="fp8", activations="fp8"), "compressed_tensors", True, False),
        (W4, "gptq", True, True),
        (Scheme(3, 128), "gptq", False, False),
        (W8, "gptq", True, False),
        (Scheme(8, 128, symmetric=False), "gptq", False, False),
        (Scheme(4, 128, symmetric=False), "awq", True, True),
    ],
)
def test_a_scheme_without_kernel_is_found(scheme: Scheme, format_name: str, gpu: bool, cpu: bool):
    linears = [linear("mlp.down_proj", scheme)]
    assert bool(kernel_problems(linears, format_name)) is not (gpu or cpu)
    assert bool(cpu_problems(linears, format_name)) is not cpu


@pytest.mark.parametrize(
    ("scheme", "format_name", "runs"),
    [  # on 7.5, 8.0, 8.9, 9.0 and 10.0
        (W4, "compressed_tensors", "Marlin Marlin Marlin Machete Marlin"),
        (Scheme(4, 32), "compressed_tensors", "Marlin Marlin Marlin Marlin Marlin"),
        (Scheme(8, 128, symmetric=False), "compressed_tensors", "Humming Humming Humming Machete Humming"),
        (A8, "compressed_tensors", "Cutlass_int8 Cutlass_int8 Cutlass_int8 Cutlass_int8 -"),
        (
            Scheme(8, "row", number="fp8", activations="fp8"),
            "compressed_tensors",
            "FP8_Marlin FP8_Marlin " + 3 * "Cutlass_FP8 ",
        ),
        (Scheme(4, 128, activations="fp8"), "compressed_tensors", "- - - Cutlass_W4A8 -"),
        (Scheme(4, 128, activations="int8"), "compressed_tensors", "- - - - -"),
        (Scheme(3, 128, activations="int8"), "compressed_tensors", "Humming Humming Humming Humming Humming"),
        (Scheme(4, 16, number="nvfp4"), "compressed_tensors", 5 * "NVFP4_Marlin "),
        (Scheme(4, 32, number="mxfp4"), "compressed_tensors", "- MXFP4_Marlin MXFP4_Marlin MXFP4_Marlin -"),
        (Scheme(8, 32, number="mxfp8"), "compressed_tensors", "- MXFP8_Marlin MXFP8_Marlin MXFP8_Marlin -"),
        (
            Scheme(8, "block", number="fp8", activations="fp8"),
            "compressed_tensors",
            "FP8_Marlin FP8_Marlin FP8_block FP8_block FP8_block",
        ),
        (Scheme(4, 128, symmetric=False), "awq", "Marlin Marlin Marlin Machete Marlin"),
        (Scheme(4, 64), "compressed_tensors", "Marlin Marlin Marlin Machete Marlin"),
        (Scheme(8, "tensor"), "compressed_tensors", "Marlin Marlin Marlin Machete Marlin"),
        (Scheme(4, 256), "compressed_tensors", "Humming Humming Humming Humming Humming"),
        (Scheme(8, "tensor"), "gptq", "Marlin Marlin Marlin Machete Marlin"),
        (Scheme(4, 256), "gptq", "- - - - -"),
    ],
)
def test_an_architecture_runs_what_it_has_a_kernel_for(scheme: Scheme, format_name: str, runs: str):
    for card, name in zip([(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)], runs.split(), strict=True):
        kernel = serving_kernels(scheme, format_name).on_gpu(card)
        assert (kernel.name if kernel else "-") == name.replace("_", " ")
        problems = gpu_problems([linear("mlp.down_proj", scheme), linear("mlp.up_proj", None)], format_name, card)
        assert [problem.partition(":")[0] for problem in problems] == (["rule kernel"] if name == "-" else [])
    assert hardware_problems([linear("mlp.down_proj", scheme)], format_name, None) == []


def test_a_gpu_without_the_kernel_is_named_with_those_that_have_it():
    (problem,) = gpu_problems([linear("mlp.down_proj", A8)], "compressed_tensors", (10, 0))
    where = "is not served on compute capability 10.0 (Blackwell)"
    assert problem == f"rule kernel: {A8.label()} {where}: its kernel is Cutlass int8 (7.5 to 9.0)"


def test_the_refusal_of_a_kernel_that_changes_the_inputs_says_so():
    (problem,) = gpu_problems([linear("mlp.down_proj", Scheme(4, 32, number="mxfp4"))], "compressed_tensors", (10, 0))
    assert "newer GPUs also round the inputs to 4 bits: use number: nvfp4" in problem
    (problem,) = kernel_problems([linear("mlp.down_proj", Scheme(4, 64, activations="int8"))], "compressed_tensors")
    assert "Machete or Marlin, whose inputs stay 16 bits" in problem


def test_the_requirement_for_serving_is_reported():
    asymmetric = serving_kernels(Scheme(8, 128, symmetric=False), "compressed_tensors")
    assert asymmetric.requirement() == "needs the humming-kernels package except on 9.0"
    assert serving_kernels(Scheme(4, 16), "compressed_tensors").requirement() == "needs the humming-kernels package"
    assert [serving_kernels(scheme, "compressed_tensors").requirement() for scheme in (W4, A8)] == ["", ""]
    (problem,) = cpu_problems([linear("mlp.down_proj", Scheme(3, 128))], "compressed_tensors")
    assert problem.endswith("vLLM has no CPU kernel for it")  # a package for GPUs would not help
    for problems in (kernel_problems, lambda found, name: gpu_problems(found, name, (9, 0))):
        assert "groups of 32, 64, 128" in problems([linear("mlp.down_proj", Scheme(4, 256))], "gptq")[0]


def test_cutlass_takes_multiples_of_128_of_the_fused_linear():
    mixed = Scheme(4, 128, activations="fp8")
    halves = [linear(f"mlp.{name}", mixed, (192, 256), "mlp.gate_up_proj") for name in ("gate_proj", "up_proj")]
    assert gpu_problems(halves, "compressed_tensors", (9, 0)) == []
    (problem,) = gpu_problems(halves[:1], "compressed_tensors", (9, 0))
    assert problem.endswith("gate_up_proj [192, 256]: Cutlass W4A8 needs multiples of 128")


def test_heads_are_shared_whole():
    heads = {"text_config": 32, "vision_config": 16}
    assert head_problems(heads, {}, 16) == head_problems({}, {}, 3) == []
    (problem,) = head_problems(heads, {}, 32)
    assert problem == "rule tensor-parallel: vision_config: 16 attention heads cannot be divided among 32 GPUs"


def test_key_and_value_heads_are_divided_or_repeated():
    """vLLM asserts that one of the two numbers divides the other."""
    fails = {(n, degree) for n in (2, 3, 8) for degree in (1, 2, 4, 8) if head_problems({}, {"text_config": n}, degree)}
    assert fails == {(3, 2), (3, 4), (3, 8)}
    (problem,) = head_problems({"text_config": 12}, {"text_config": 3}, 2)
    assert problem == "rule tensor-parallel: text_config: 3 key and value heads cannot be divided among 2 GPUs"
    grouped = header_config("Qwen--Qwen2.5-VL-7B-Instruct")
    assert FAMILIES["qwen2.5-vl"].shared_heads(grouped) == {"text_config": 4}
    assert FAMILIES["blip2"].shared_heads(header_config("Salesforce--blip2-opt-2.7b")) == {}


@pytest.mark.parametrize("name", HEADER_NAMES)
def test_heads_of_every_published_model_are_known(name: str) -> None:
    """LLaVA-1.5's config.json leaves out all sizes of its text model; key and value heads follow from the others."""
    config = header_config(name)
    family = next(f for f in FAMILIES.values() if config["architectures"][0] in f.architectures).of(config)
    heads, shared = family.heads(config), family.shared_heads(config)
    assert heads
    assert all(heads[part] % number == 0 for part, number in shared.items())
    if name == "llava-hf--llava-1.5-7b-hf":
        assert "num_attention_heads" not in config["text_config"]
        assert shared == {"text_config": 32}


def test_several_gpus_divide_the_inputs_of_some_linears() -> None:
    modules = ("a.o_proj", "a.q_proj", "mlp.down_proj")
    assert input_parts(modules, 4) == {"a.o_proj": 4, "mlp.down_proj": 4}
    assert input_parts(modules, 1) == {}


def test_one_device_holds_its_shard():
    assert shard(linear("mlp.down_proj", W4, (96, 256)), 2).shape == (96, 128)
    assert shard(linear("mlp.up_proj", W4, (96, 256)), 4).shape == (24, 256)


def test_the_cpu_kernel_takes_multiples_of_32():
    assert cpu_problems([linear("mlp.down_proj", Scheme(4, 32), (96, 160))], "compressed_tensors") == []
    assert cpu_problems([linear("mlp.down_proj", Scheme(4, "row"), (100, 160))], "compressed_tensors")
    assert cpu_problems([linear("mlp.down_proj", None, (100, 160))], "compressed_tensors") == []


def test_the_cpu_kernel_sees_linears_after_fusion():
    halves = [linear(f"mlp.{name}", W4, (48, 256), "mlp.gate_up_proj") for name in ("gate_proj", "up_proj")]
    assert cpu_problems(halves, "compressed_tensors") == []
    (problem,) = cpu_problems(halves[:1], "compressed_tensors")
    assert problem.endswith("mlp.gate_up_proj [48, 256]: the CPU kernel needs multiples of 32")


@pytest.mark.parametrize(
    ("shape", "scheme", "words"),
    [
        ((1280, 3420), Scheme(4, "row"), "3420 codes of 4 bits"),  # the tower of Qwen2.5-VL
        ((1280, 3420), Scheme(8, "row"), None),
        ((1152, 4304), Scheme(4, "row"), None),  # SigLIP so400m
        ((3420, 1280), Scheme(4, 128), None),
        ((3420, 1280), Scheme(4, 128, symmetric=False), "3420 zero points"),
        ((3424, 1280), Scheme(4, 128, symmetric=False), None),
        ((100, 3420), Scheme(8, "row", activations="int8"), None),
        ((100, 3420), None, None),
    ],
)
def test_codes_fill_whole_words(shape: tuple[int, int], scheme: Scheme | None, words: str | None):
    linears = [linear(f"blocks.{i}.mlp.down_proj", scheme, shape) for i in range(2)]
    problems = packing_problems(linears)
    assert problems == [problem for problem in lint(linears, "compressed_tensors") if "rule packing" in problem]
    assert gpu_problems(linears, "compressed_tensors", (8, 0)) == problems
    assert [words in problem for problem in problems] == ([True] if words else [])


@pytest.mark.parametrize(  # measured with vLLM's own loader: ViT-g 1408, OPT 2560, Llama 11008 inputs
    ("columns", "group", "fails_at"),
    [
        (1408, 128, {2, 4, 8}),
        (1408, 64, {4, 8}),
        (1408, 32, {8}),
        (1408, "row", set()),
        (2560, 128, {8}),
        (11008, 128, {4, 8}),
        (11008, 64, {8}),
        (11008, 32, set()),
        (4096, 128, set()),
    ],
)
def test_groups_cannot_straddle_gpus(columns: int, group: int, fails_at: set[int]):
    scheme = Scheme(4, group)
    degrees = {n for n in (1, 2, 4, 8) if parallel_problems([linear("mlp.down_proj", scheme, (4096, columns))], n)}
    assert degrees == fails_at
    assert parallel_problems([linear("mlp.up_proj", scheme, (4096, columns))], 8) == []  # divided along its outputs
    assert parallel_problems([linear("mlp.up_proj", scheme, (4100, columns))], 8)


def test_gpus_hold_whole_words():
    """vLLM 0.26 ended on two H200s: start (428) + length (428) exceeds dimension size (855)."""
    for scheme, problem in {
        Scheme(8, "row"): ["3420 inputs of 8 bits in 32-bit words cannot be divided among 2 GPUs"],
        Scheme(8, "row", activations="int8"): [],
        Scheme(8, "row", number="fp8"): [],
    }.items():
        problems = parallel_problems([linear("mlp.down_proj", scheme, (1280, 3420))], 2)
        assert [text.partition("down_proj: ")[2] for text in problems] == problem
        assert parallel_problems([linear("mlp.up_proj", scheme, (3420, 1280))], 2) == []  # divided along its outputs
        assert parallel_problems([linear("mlp.down_proj", scheme, (1280, 3420))], 1) == []


@pytest.mark.parametrize("name", ["self_attn.o_proj", "self_attn.out_proj", "mlp.down_proj", "mlp.fc2", "linear_2"])
def test_linears_that_gpus_share_by_their_inputs(name: str):
    assert parallel_problems([linear(name, None, (100, 64))], 8) == []
    assert "100 inputs" in parallel_problems([linear(name, None, (64, 100))], 8)[0]


def test_patterns_are_matched_as_the_engine_does():
    q = [(W4, [r"re:.*layers\.0\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$"])]
    assert pattern_problems(attention(W4, W4, W4), q) == []
    assert pattern_problems(attention(W4, W4, W4), [(W4, [r"re:model\.layers\..*"])])  # anchored at another name
    # q at 8 bits, k and v at 4: vLLM raises nothing, the second pattern also finds the fused name
    mixed = [(W8, [r"re:.*self_attn\.q_proj$"]), (W4, [r"re:.*[kv]_proj"])]
    assert pattern_problems(attention(W8, W4, W4), mixed)
    assert pattern_problems(attention(None, None, None), q)
    names = [f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert pattern_problems(attention(W4, W4, W4), [(W4, names)]) == []
    assert pattern_problems(attention(W4, W4, W4), [(W4, names[:2])])
    assert pattern_problems(attention(None, None, None), q, ignore=names) == []  # `ignore` comes first
    assert pattern_problems(attention(W4, W4, W4), q, ignore=names)
    assert pattern_problems(attention(None, None, None), [], ignore=names) == []
    assert "names only some of its members" in pattern_problems(attention(W4, W4, W4), q, ignore=names[:2])[0]
    assert "2 groups match it" in pattern_problems(attention(W4, W4, W4), [*q, (W8, names)])[0]


@pytest.mark.parametrize("name", [name for name in built_in() if name.startswith("llava")])
def test_every_recipe_passes_every_rule_on_the_true_model(name: str, sparse_checkpoint: Callable[[str], Path]):
    family = FAMILIES["llava"]
    checkpoint = Checkpoint.open(sparse_checkpoint("llava-hf--llava-1.5-7b-hf"), family.canonical_name)
    plan = make_plan(load_recipe(name), checkpoint, family, H100)
    linears = engine_linears(plan.rows, family)
    assert len(linears) == 23 * 6 + 2 + 32 * 7 + 1
    assert len({schemes.engine for schemes in linears}) == 23 * 4 + 2 + 32 * 4 + 1
    schemes = [(group.scheme, group.targets) for group in groups(plan)]
    assert pattern_problems(linears, schemes, kept_modules(plan)) == []
    assert parallel_problems(linears, 2) == []


def test_a_plan_names_the_rule(sparse_checkpoint: Callable[[str], Path]):
    family = FAMILIES["llava"]
    checkpoint = Checkpoint.open(sparse_checkpoint("llava-hf--llava-1.5-7b-hf"), family.canonical_name)
    data = load_recipe("llava-w4").model_dump()
    data |= {"format": "gptq", "quantize": [{"component": "language", "bits": 3, "group_size": 128}]}
    with pytest.raises(PlanError, match="rule kernel: "):
        make_plan(Recipe.model_validate(data), checkpoint, family, H100)


def test_engine_classes_are_those_of_the_loader():
    assert engine_classes(W4) == engine_classes(W8) == ("CompressedTensorsWNA16",)
    assert engine_classes(A8) == ("CompressedTensorsW8A8Int8",)
    assert engine_classes(Scheme(4, 128, activations="fp8")) == ("CompressedTensorsW4A8Fp8",)
    assert engine_classes(Scheme(8, "row", number="fp8")) == ("CompressedTensorsW8A16Fp8",)
