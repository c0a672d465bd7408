"""What vLLM asks of a quantized model, as rules on plain data: neither vLLM nor a GPU is needed.

Read from vLLM 0.32 (`compressed_tensors/utils.py`, `compressed_tensors.py`, kernel lists) and compared with its own
functions in `tests/vllm/`. Every problem starts with the name of its rule:

fused-scheme     linears that the engine fuses (q/k/v, gate/up) share one scheme, or are all kept
pattern          the config's targets give every linear, under the engine's fused name, its scheme and no other
unbuilt-block    blocks that the engine does not build (after CLIP's feature block) hold nothing packed
kernel           some kernel of the engine runs the scheme in this format, on the hardware if one is named
kv-cache         the artifact can say in which number type the cache is kept, and the engine can keep it so
tensor-parallel  a linear's shape and groups can be divided among the GPUs
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.numerics.quantized import Scheme
from exporter.planning.vllm_kernels import ARCHITECTURES, Capability, Hardware, capability_label, serving

# Divided along their inputs; all others are divided along their outputs.
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "projection", "linear_2", "dense")


@dataclass(frozen=True)
class Linear:
    """One linear as the engine sees it.

    name: its own runtime name; engine: the linear it becomes, the fused one's name if it is fused. shape: `(out, in)`.
    scheme: None when it stays in 16 bits. built: whether the engine makes its block at all.
    """

    name: str
    engine: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    built: bool = True


def lint(linears: Sequence[Linear], format_name: str) -> list[str]:
    """Problems that any server of this model would have, on one GPU."""
    return [*fused_problems(linears), *unbuilt_problems(linears), *kernel_problems(linears, format_name)]


def fused_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule fused-scheme."""
    return [
        f"rule fused-scheme: vLLM fuses {', '.join(_last(m.name) for m in found)} into {engine}; they need one scheme"
        for engine, found in _fused(linears).items()
        if len({m.scheme for m in found}) > 1
    ]


def _fused(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Name in the engine -> the linears that it fuses into that one."""
    members: dict[str, list[Linear]] = {}
    for linear in linears:
        members.setdefault(linear.engine, []).append(linear)
    return members


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def unbuilt_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule unbuilt-block."""
    return [
        f"rule unbuilt-block: {linear.name} is packed, and vLLM does not build its block: its tensors have no place"
        for linear in linears
        if linear.scheme and not linear.built
    ]


def kernel_problems(linears: Iterable[Linear], format_name: str) -> list[str]:
    """Rule kernel: one line for every scheme that neither a GPU nor a CPU can run."""
    first: dict[Scheme, Linear] = {}
    for linear in linears:
        if linear.scheme:
            first.setdefault(linear.scheme, linear)
    problems = []
    for scheme, linear in first.items():
        found = serving(scheme, format_name)
        if not found.cuda and not found.cpu:
            reason = found.note or f"it has none for {scheme.label()} in format {format_name}"
            problems.append(f"rule kernel: {linear.name}, {scheme.label()}: vLLM has no kernel for it: {reason}")
    return problems


def cache_problems(kv_cache: str | None, format_name: str, able: Collection[str], packed: bool) -> list[str]:
    """Rule kv-cache. able: the number types that the format's config can name; packed: whether there is a config."""
    if kv_cache is None or (packed and kv_cache in able):
        return []
    why = f"format {format_name} has no field for the type of a cache; use compressed_tensors"
    if kv_cache in able:
        why = "an artifact with nothing packed has no quantization config to name it"
    return [f"rule kv-cache: kv_cache: {kv_cache}: {why}, or leave it out and serve with --kv-cache-dtype {kv_cache}"]


def parallel_problems(linears: Iterable[Linear], degree: int) -> list[str]:
    """Rule tensor-parallel: what `degree` GPUs cannot share; one shares everything."""
    problems = []
    for linear in linears:
        rows, columns = linear.shape
        if _last(linear.name) not in ROW_PARALLEL:
            if rows % degree:
                problems.append(f"{linear.name}: {rows} outputs")
        elif columns % degree:
            problems.append(f"{linear.name}: {columns} inputs")
        elif linear.scheme and isinstance(linear.scheme.group_size, int):
            size = linear.scheme.columns_per_group(columns)
            if columns // degree % size:
                problems.append(f"{linear.name}: {columns} inputs in groups of {size}")
    return [f"rule tensor-parallel: {problem} cannot be divided among {degree} GPUs" for problem in problems]


def head_problems(config: Mapping[str, Any], degree: int) -> list[str]:
    """Rule tensor-parallel: attention heads that `degree` GPUs cannot share. config: of the whole model."""
    heads = {part: (config.get(part) or {}).get("num_attention_heads") for part in ("text_config", "vision_config")}
    return [
        f"rule tensor-parallel: {part}: {number} attention heads cannot be divided among {degree} GPUs"
        for part, number in heads.items()
        if number and number % degree
    ]


def share(linear: Linear, degree: int) -> Linear:
    """The part of a linear that one of `degree` devices holds."""
    rows, columns = linear.shape
    by_inputs = _last(linear.name) in ROW_PARALLEL
    return replace(linear, shape=(rows, columns // degree) if by_inputs else (rows // degree, columns))


def pattern_problems(
    linears: Iterable[Linear], groups: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str] = ()
) -> list[str]:
    """Rule pattern, for compressed-tensors. groups: scheme and targets of every config group, in order."""
    problems = []
    for engine, found in _fused(linear for linear in linears if linear.built).items():
        wanted = found[0].scheme
        names = [linear.name for linear in found]
        if len({_ignored(name, ignore) for name in names}) > 1:
            problems.append(f"rule pattern: {engine}: `ignore` names some of its members alone: vLLM stops at that")
            continue
        given = matched_scheme(engine, names, groups, ignore)
        every = {scheme for scheme, targets in groups if any(matches(t, n) for t in targets for n in [engine, *names])}
        if given != wanted or len(every) > 1:
            said = [scheme.label() if scheme else "16 bits" for scheme in (wanted, given)]
            more = f" ({len(every)} groups name it)" if len(every) > 1 else ""
            problems.append(f"rule pattern: {engine} should be {said[0]}, vLLM's matching gives it {said[1]}{more}")
    return problems


def matched_scheme(
    engine: str, members: Sequence[str], groups: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str]
) -> Scheme | None:
    """The scheme vLLM gives a linear: `ignore` first, then the first target that names it or all of its members."""
    if all(_ignored(name, ignore) for name in members):
        return None
    targets = [(scheme, target) for scheme, found in groups for target in found]
    for scheme, target in targets:
        if matches(target, engine):
            return scheme
    hits = [next((scheme for scheme, target in targets if matches(target, name)), None) for name in members]
    return hits[0] if all(hits) else None


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    return any(matches(pattern, name) for pattern in ignore)


def matches(target: str, name: str) -> bool:
    """vLLM's rule: `re:` patterns match from the start, other targets are whole names."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def cpu_problems(linears: Iterable[Linear], format_name: str) -> list[str]:
    """What keeps the CPU build from serving the model; its 4-bit kernel takes multiples of 32 either way."""
    problems = []
    for linear in linears:
        if linear.scheme is None:
            continue
        kernel = serving(linear.scheme, format_name)
        if kernel.cpu is None:
            why = kernel.note or "no CPU kernel"
            problems.append(f"rule kernel: {linear.scheme.label()} is not served on a CPU: {why}")
        elif linear.scheme.bits == 4 and any(side % 32 for side in linear.shape):
            problems.append(f"rule kernel: {linear.name} {list(linear.shape)}: the CPU kernel takes multiples of 32")
    return sorted(set(problems), key=problems.index)


def hardware_problems(linears: Sequence[Linear], format_name: str, on: Hardware) -> list[str]:
    """Rule kernel for the machine that is to serve, as far as it is known."""
    if on == "cpu":
        return cpu_problems(linears, format_name)
    return card_problems(linears, format_name, on) if on else []


def card_problems(linears: Sequence[Linear], format_name: str, card: Capability) -> list[str]:
    """Rule kernel: what a GPU of this compute capability cannot run."""
    problems = []
    where = f"compute capability {capability_label(card)} ({ARCHITECTURES.get(card, 'a GPU')})"
    for scheme in dict.fromkeys(linear.scheme for linear in linears if linear.scheme):
        kernels = serving(scheme, format_name)
        if kernels.on(card) is None:
            why = f"its kernel is {kernels.cards()}" if kernels.cuda else kernels.note
            problems.append(f"rule kernel: {scheme.label()} is not served on {where}: {why}")
    return problems or mixed_problems(linears)


def mixed_problems(linears: Iterable[Linear]) -> list[str]:
    """Rule kernel: Cutlass W4A8 takes multiples of 128 either way, of the linear as the engine fuses it."""
    fused = _fused(linear for linear in linears if linear.scheme and linear.scheme.mixed)
    shapes = {engine: (sum(m.shape[0] for m in found), found[0].shape[1]) for engine, found in fused.items()}
    return [
        f"rule kernel: {engine} {list(shape)}: Cutlass W4A8 takes multiples of 128"
        for engine, shape in shapes.items()
        if any(side % 128 for side in shape)
    ]


def head_size(config: Mapping[str, Any]) -> int | None:
    """Numbers of one attention head of the language model, None if the whole model's config says nothing of it."""
    text = config.get("text_config") or {}
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    size: int | None = text.get("head_dim") or (width // heads if heads and width else None)
    return size


def cpu_cache_problems(kv_cache: str | None, config: Mapping[str, Any]) -> list[str]:
    """Rule kv-cache on a CPU (which also needs AVX-512 for float8; vLLM says so itself). config: of the whole model."""
    size = head_size(config)
    if kv_cache is None or size is None or size % 32 == 0:
        return []
    return [f"rule kv-cache: heads of {size}: the CPU build keeps a float8 cache for heads in multiples of 32"]


def engine_class(scheme: Scheme) -> tuple[str, ...]:
    """Classes of vLLM's compressed-tensors loader that a scheme may be given."""
    if scheme.number == "fp8":
        weight_only = "CompressedTensorsW8A16Fp8"  # also what 8.0 cards make of float8 activations
        return ("CompressedTensorsW8A8Fp8", weight_only) if scheme.activations else (weight_only,)
    if scheme.mixed:
        return ("CompressedTensorsW4A8Fp8",)
    if scheme.activations == "int8":
        return ("CompressedTensorsW8A8Int8",)
    return ("CompressedTensorsWNA16",)
