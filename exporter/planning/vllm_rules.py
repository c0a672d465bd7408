"""Requirements of vLLM on a quantized model, as rules on plain data; neither vLLM nor a GPU is needed.

Read from vLLM 0.32 (`compressed_tensors/utils.py`, `compressed_tensors.py`, kernel lists) and compared with its own
functions in `tests/vllm/`. Every problem starts with the name of its rule:

fused-scheme     linears that vLLM fuses (q/k/v, gate/up) share one scheme, or are all kept
pattern          the config's targets match every linear, under its fused name, to its own scheme and no other
unbuilt-block    blocks that vLLM does not build (after CLIP's feature block) have no packed linears
kernel           a kernel of vLLM runs the scheme in this format, on the given hardware
packing          codes fill whole 32-bit words where vLLM computes sizes from the number of words
kv-cache         the artifact's config or a flag can name the number type of the KV cache, and vLLM supports it

Rule tensor-parallel is in `tensor_parallel.py`.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from exporter.numerics.kv_caches import BY_FLAG, LEAST_HEAD
from exporter.numerics.quantized import Scheme
from exporter.planning.rule import WORD_BITS
from exporter.planning.vllm_kernels import ARCHITECTURES, Capability, Hardware, capability_label, serving_kernels

FLOAT_CLASSES = {
    "nvfp4": "CompressedTensorsW4A4Fp4",
    "mxfp4": "CompressedTensorsW4A4Mxfp4",
    "mxfp8": "CompressedTensorsW8A8Mxfp8",
}


@dataclass(frozen=True)
class Linear:
    """One linear as vLLM builds it.

    name: its own name at runtime. engine: the name of vLLM's linear that contains it, which differs if it is fused.
    shape: `(out, in)`. scheme: None when it stays in 16 bits. built: whether vLLM builds its block.
    """

    name: str
    engine: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    built: bool = True


def lint(linears: Sequence[Linear], format_name: str) -> list[str]:
    """Problems on one GPU of unknown kind: rules fused-scheme, unbuilt-block, kernel and packing."""
    problems = [*fused_problems(linears), *unbuilt_problems(linears), *kernel_problems(linears, format_name)]
    return problems + packing_problems(linears)


def fused_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule fused-scheme."""
    return [
        f"rule fused-scheme: vLLM fuses {', '.join(last_name(m.name) for m in members)} into {engine}; "
        "they need one scheme"
        for engine, members in _fused(linears).items()
        if len({m.scheme for m in members}) > 1
    ]


def _fused(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Name of vLLM's linear -> the checkpoint's linears in it."""
    members: dict[str, list[Linear]] = {}
    for linear in linears:
        members.setdefault(linear.engine, []).append(linear)
    return members


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def unbuilt_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule unbuilt-block."""
    return [
        f"rule unbuilt-block: {linear.name} is packed, but vLLM does not build its block and cannot load its tensors"
        for linear in linears
        if linear.scheme and not linear.built
    ]


def kernel_problems(linears: Iterable[Linear], format_name: str) -> list[str]:
    """Rule kernel: one problem for every scheme that vLLM runs neither on a GPU nor on a CPU."""
    first: dict[Scheme, Linear] = {}
    for linear in linears:
        if linear.scheme:
            first.setdefault(linear.scheme, linear)
    problems = []
    for scheme, linear in first.items():
        kernels = serving_kernels(scheme, format_name)
        if not kernels.cuda and not kernels.cpu:
            reason = kernels.note or f"format {format_name} does not support {scheme.label()}"
            problems.append(f"rule kernel: {linear.name}, {scheme.label()}: vLLM has no kernel for it: {reason}")
    return problems


def packing_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule packing, for weights that are packed into 32-bit words: one problem for linears of the same name and shape.

    Marlin computes the inputs of a word from a column's number of words (`marlin_pad_qweight`), and vLLM's loader the
    place of a fused linear's zero points (`_adjust_shard_indexes_for_packing`); both round down.
    """
    problems = []
    for linear in linears:
        scheme = linear.scheme
        if not packed_in_words(scheme):
            continue
        rows, columns = linear.shape
        name = f"rule packing: {last_name(linear.name)} {[rows, columns]}, {scheme.label()}"
        if scheme.bits == 4 and columns % 8:
            remedy = "use 8 bits or keep it: `else: row` or `else: keep` beside a group_size does so"
            problems.append(f"{name}: {columns} codes of 4 bits fill no whole number of 32-bit words; {remedy}")
        if not scheme.symmetric and rows * scheme.bits % WORD_BITS:
            problems.append(f"{name}: {rows} zero points fill no whole number of 32-bit words; use symmetric: true")
    return list(dict.fromkeys(problems))


def cache_problems(
    kv_cache: str | None, format_name: str, able: Collection[str], packed: bool, head: int | None = None
) -> list[str]:
    """Rule kv-cache.

    able: the number types that the format's config can name. packed: whether the artifact has a quantization config.
    head: size of an attention head; None when the model's config does not have it.
    """
    if kv_cache and kv_cache in BY_FLAG:
        return _head_problems(kv_cache, head) if head else []
    if kv_cache is None or (packed and kv_cache in able):
        return []
    reason = f"format {format_name} has no field for the KV-cache dtype; use compressed_tensors"
    if kv_cache in able:
        reason = "an artifact without packed linears has no quantization config for the KV-cache dtype"
    return [
        f"rule kv-cache: kv_cache: {kv_cache}: {reason}, or remove kv_cache and serve with --kv-cache-dtype {kv_cache}"
    ]


def _head_problems(kv_cache: str, head: int) -> list[str]:
    """Rule kv-cache: sizes of attention heads for the caches with a scale per token and head."""
    if head >= LEAST_HEAD:
        return []
    need = f"vLLM's Triton attention needs at least {LEAST_HEAD}"
    return [f"rule kv-cache: kv_cache: {kv_cache}: attention heads of {head}: {need}"]


def packed_in_words(scheme: Scheme | None) -> TypeGuard[Scheme]:
    """Whether the codes are packed along the inputs into 32-bit words."""
    return scheme is not None and scheme.number == "int" and not (scheme.as_int8 or scheme.mixed)


def pattern_problems(
    linears: Iterable[Linear], groups: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str] = ()
) -> list[str]:
    """Rule pattern, for compressed-tensors. groups: scheme and targets of every config group, in order."""
    problems = []
    for engine, members in _fused(linear for linear in linears if linear.built).items():
        expected = members[0].scheme
        names = [linear.name for linear in members]
        if len({_ignored(name, ignore) for name in names}) > 1:
            problems.append(f"rule pattern: {engine}: `ignore` names only some of its members, which vLLM refuses")
            continue
        actual = matched_scheme(engine, names, groups, ignore)
        schemes = {
            scheme for scheme, targets in groups if any(matches(t, n) for t in targets for n in [engine, *names])
        }
        if actual != expected or len(schemes) > 1:
            labels = [scheme.label() if scheme else "16 bits" for scheme in (expected, actual)]
            more = f" ({len(schemes)} groups match it)" if len(schemes) > 1 else ""
            problems.append(f"rule pattern: {engine} should be {labels[0]}, but vLLM matches it to {labels[1]}{more}")
    return problems


def matched_scheme(
    engine: str, members: Sequence[str], groups: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str]
) -> Scheme | None:
    """The scheme that vLLM gives a linear; None for 16 bits.

    `ignore` comes first, then the first target that matches the linear, then the targets of its members if all match
    one.
    """
    if all(_ignored(name, ignore) for name in members):
        return None
    targets = [(scheme, target) for scheme, patterns in groups for target in patterns]
    for scheme, target in targets:
        if matches(target, engine):
            return scheme
    hits = [next((scheme for scheme, target in targets if matches(target, name)), None) for name in members]
    return hits[0] if all(hits) else None


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    return any(matches(pattern, name) for pattern in ignore)


def matches(target: str, name: str) -> bool:
    """vLLM's matching: `re:` patterns match from the start of the name, other targets equal the whole name."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def cpu_problems(linears: Iterable[Linear], format_name: str) -> list[str]:
    """Rule kernel on a CPU: schemes without a CPU kernel, and 4-bit linears with a side that is no multiple of 32."""
    problems = []
    for (engine, scheme), shape in _fused_shapes(linears).items():
        kernel = serving_kernels(scheme, format_name)
        if kernel.cpu is None:
            reason = kernel.note or "vLLM has no CPU kernel for it"
            problems.append(f"rule kernel: {scheme.label()} is not served on a CPU: {reason}")
        elif scheme.bits == 4 and any(side % 32 for side in shape):
            problems.append(f"rule kernel: {engine} {list(shape)}: the CPU kernel needs multiples of 32")
    return sorted(set(problems), key=problems.index)


def _fused_shapes(linears: Iterable[Linear]) -> dict[tuple[str, Scheme], tuple[int, int]]:
    """Name and scheme of vLLM's packed linears -> their shapes, after fusion."""
    shapes: dict[tuple[str, Scheme], tuple[int, int]] = {}
    for linear in linears:
        if linear.scheme:
            key, (rows, columns) = (linear.engine, linear.scheme), linear.shape
            shapes[key] = (shapes.get(key, (0, 0))[0] + rows, columns)
    return shapes


def hardware_problems(linears: Sequence[Linear], format_name: str, on: Hardware) -> list[str]:
    """Rule kernel on the serving hardware; none when the GPU is unknown."""
    if on == "cpu":
        return cpu_problems(linears, format_name)
    return gpu_problems(linears, format_name, on) if on else []


def gpu_problems(linears: Sequence[Linear], format_name: str, gpu: Capability) -> list[str]:
    """Rule kernel: schemes that a GPU of this compute capability cannot run."""
    problems = []
    where = f"compute capability {capability_label(gpu)} ({ARCHITECTURES.get(gpu, 'a GPU')})"
    for scheme in dict.fromkeys(linear.scheme for linear in linears if linear.scheme):
        kernels = serving_kernels(scheme, format_name)
        if kernels.on_gpu(gpu) is None:
            reason = f"its kernel is {kernels.gpu_label()}" if kernels.cuda else kernels.note
            reason += f"; {kernels.note}" if kernels.cuda and kernels.note and scheme.grid else ""
            problems.append(f"rule kernel: {scheme.label()} is not served on {where}: {reason}")
    return problems or [*mixed_problems(linears), *packing_problems(linears)]


def mixed_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule kernel: Cutlass W4A8 needs multiples of 128 on both sides of a linear after fusion."""
    return [
        f"rule kernel: {engine} {list(shape)}: Cutlass W4A8 needs multiples of 128"
        for (engine, scheme), shape in _fused_shapes(linears).items()
        if scheme.mixed and any(side % 128 for side in shape)
    ]


def head_size(config: Mapping[str, Any]) -> int | None:
    """Width of one attention head of the language model; None if the model's config does not have it."""
    text = config.get("text_config") or config  # older Qwen files have its keys at the top level
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    size: int | None = text.get("head_dim") or (width // heads if heads and width else None)
    return size


def cpu_cache_problems(kv_cache: str | None, size: int | None) -> list[str]:
    """Rule kv-cache on a CPU. size: `head_size` of the model. `serving.preflight` checks the processor's AVX-512."""
    if kv_cache in BY_FLAG:
        return [f"rule kv-cache: {kv_cache}: vLLM's CPU build has no such cache; serve it on a GPU"]
    if kv_cache is None or size is None or size % 32 == 0:
        return []
    return [f"rule kv-cache: attention heads of {size}: on a CPU, vLLM's float8 cache needs heads in multiples of 32"]


def engine_classes(scheme: Scheme) -> tuple[str, ...]:
    """Names of vLLM's compressed-tensors classes that can load a scheme."""
    if scheme.number in FLOAT_CLASSES:
        return (FLOAT_CLASSES[scheme.number],)
    if scheme.number == "fp8":
        weight_only = "CompressedTensorsW8A16Fp8"  # GPUs of capability 8.0 use it for float8 activations too
        return ("CompressedTensorsW8A8Fp8", weight_only) if scheme.activations else (weight_only,)
    if scheme.mixed:
        return ("CompressedTensorsW4A8Fp8",)
    if scheme.activations == "int8":
        return ("CompressedTensorsW8A8Int8" if scheme.as_int8 else "CompressedTensorsWNA8Int",)
    return ("CompressedTensorsWNA16",)
