"""Build the artifact's config.json from a plan, with the `re:` patterns that match the linears of each scheme.

vLLM matches the patterns against its own module names (fused, sometimes without prefix), transformers against the
names of the live model. Every pattern is therefore built from `Component.target`, which matches both.
"""

from collections.abc import Mapping
from typing import Any

from exporter.formats import FORMATS
from exporter.formats.config_group import ConfigGroup
from exporter.model.families import Component
from exporter.numerics.kv_caches import BY_FLAG
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan, PlanRow


def artifact_config(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config.json with a quantization config; without packed linears there is no quantization config.

    The dtype becomes bfloat16 where vLLM's kernels have no other output dtype: Cutlass kernels for 4-bit weights with
    float8 inputs, kernels whose scales are powers of two, and FlashAttention 3 with float8 keys and values ("output
    must have dtype BF16").
    """
    schemes, result = groups(plan), dict(config)
    if schemes:
        write = FORMATS[plan.recipe.format].quantization_config
        result["quantization_config"] = write(schemes, kept_modules(plan), named_cache(plan))
    return in_dtype(result, "bfloat16") if needs_bfloat16(plan) else result


def needs_bfloat16(plan: Plan) -> bool:
    """Whether vLLM's kernels for this plan have no other output dtype than bfloat16."""
    schemes = [group.scheme for group in groups(plan)]
    return bool(named_cache(plan)) or any(scheme.mixed or scheme.powers_of_two for scheme in schemes)


def named_cache(plan: Plan) -> str | None:
    """The number type of the KV cache that config.json names; None for 16 bits, and for those that a flag names."""
    return None if plan.recipe.kv_cache in BY_FLAG else plan.recipe.kv_cache


def in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json with `dtype` as the dtype of the model and of every sub-config that has a dtype key."""
    changed = {key: in_dtype(value, dtype) if key.endswith("_config") else value for key, value in config.items()}
    present = [key for key in ("dtype", "torch_dtype") if changed.get(key) is not None]
    keys = ["dtype"] if "architectures" in changed and not present else present
    return changed | dict.fromkeys(keys, dtype)


def groups(plan: Plan) -> list[ConfigGroup]:
    """One group per scheme of the packed linears, in plan order."""
    packed = [row for row in plan.rows if row.decision == "packed"]
    schemes: dict[Scheme, list[PlanRow]] = {}
    for row in packed:
        assert row.scheme is not None
        schemes.setdefault(row.scheme, []).append(row)
    return [ConfigGroup(scheme, tuple(_patterns(plan, rows))) for scheme, rows in schemes.items()]


def kept_modules(plan: Plan) -> list[str]:
    """Runtime names of the linears that are not packed."""
    modules = [row for row in plan.rows if row.decision != "packed" and _is_linear(plan, row)]
    return [plan.family.runtime_name(row.module) for row in modules]


def cache_scales(plan: Plan) -> list[str]:
    """Names of the key and value scales that the artifact stores; empty unless config.json names its type.

    vLLM uses 1 for a missing scale, but transformers leaves the parameter uninitialized, so mmq stores them.
    """
    if named_cache(plan) is None:
        return []
    end, names = ".k_proj.weight", [row.tensor.name for row in plan.rows if row.component == "language"]
    blocks = [name.removesuffix(end) for name in names if name.endswith(end)]
    return [f"{block}.{part}_scale" for block in blocks for part in "kv"]


def _is_linear(plan: Plan, row: PlanRow) -> bool:
    """Whether a row is a planned linear, a head that the family keeps, or a linear of a block that never runs."""
    if row.linear or plan.family.reason_kept(row.module):
        return True
    return any(
        row.component == component.name and row.module.endswith(tuple(f".{linear}" for linear in component.linears))
        for component in plan.family.components
    )


def _patterns(plan: Plan, rows: list[PlanRow]) -> list[str]:
    """`re:` patterns that match exactly `rows`: one per component and set of blocks."""
    patterns: list[str] = []
    for component in plan.family.components:
        blocks: dict[str, set[int]] = {}
        for row in rows:
            if row.component == component.name:
                blocks.setdefault(row.linear, set()).add(_index(component, row.block))
        together: dict[tuple[int, ...], list[str]] = {}
        for linear, indices in blocks.items():
            together.setdefault(tuple(sorted(indices)), []).append(linear)
        patterns += [_pattern(component, indices, linears) for indices, linears in together.items()]
    return patterns


def _index(component: Component, block: str) -> int:
    """Index of a block in its component; 0 when the component has one block."""
    before, placeholder, after = component.blocks.partition("{i}")
    return int(block.removeprefix(before).removesuffix(after)) if placeholder else 0


def _pattern(component: Component, indices: tuple[int, ...], linears: list[str]) -> str:
    if linears == [component.blocks]:  # the component is one linear
        return f"re:{component.target}$"
    fused = [name for name, members in component.fused.items() if set(members) <= set(linears)]
    names = "|".join(name.replace(".", r"\.") for name in [*linears, *fused])
    number = f"({'|'.join(map(str, indices))})" if len(indices) > 1 else str(indices[0])
    return "re:" + component.target.replace("{i}", number) + rf"\.({names})$"
