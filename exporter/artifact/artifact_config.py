"""From a plan to the artifact's config.json: which patterns name the linears of each scheme.

vLLM matches `re:` patterns against its own (fused, sometimes unprefixed) module names and transformers against
live names, so every pattern is made from `Component.target`, which finds both.
"""

from collections.abc import Mapping
from typing import Any

from exporter.formats import FORMATS
from exporter.formats.group import Group
from exporter.model.families import Component
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan, PlanRow


def artifact_config(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """The artifact's config.json from the source's; the same where all is dequantized, which makes a plain model.

    It asks for bfloat16 where an engine's kernels write nothing else: those for 4-bit weights with float8 inputs
    (Cutlass), and FlashAttention 3 when keys and values are float8 ("output must have dtype BF16").
    """
    found, described = groups(plan), dict(config)
    if found:
        write = FORMATS[plan.recipe.format].quantization_config
        described["quantization_config"] = write(found, kept_modules(plan), plan.recipe.kv_cache)
    if plan.recipe.kv_cache or any(group.scheme.mixed for group in found):
        described = in_dtype(described, "bfloat16")
    return described


def in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that asks for `dtype`, for the whole model and for every part that names one."""
    changed = {key: in_dtype(value, dtype) if key.endswith("_config") else value for key, value in config.items()}
    named = [key for key in ("dtype", "torch_dtype") if changed.get(key) is not None]
    whole = ["dtype"] if "architectures" in changed and not named else named
    return changed | dict.fromkeys(whole, dtype)


def groups(plan: Plan) -> list[Group]:
    """One group for every scheme among the packed linears, in plan order."""
    packed = [row for row in plan.rows if row.decision == "packed"]
    schemes: dict[Scheme, list[PlanRow]] = {}
    for row in packed:
        assert row.scheme is not None
        schemes.setdefault(row.scheme, []).append(row)
    return [Group(scheme, tuple(_patterns(plan, rows))) for scheme, rows in schemes.items()]


def kept_modules(plan: Plan) -> list[str]:
    """Runtime names of the linears that stay in 16 bits."""
    modules = [row for row in plan.rows if row.decision != "packed" and _is_linear(plan, row)]
    return [plan.family.runtime_name(row.module) for row in modules]


def cache_scales(plan: Plan) -> list[str]:
    """Names of the scales of keys and values that the artifact holds: none unless the recipe narrows the cache.

    Engines take 1 where there is none; transformers then leaves them as memory happened to be.
    """
    if plan.recipe.kv_cache is None:
        return []
    end, names = ".k_proj.weight", [row.tensor.name for row in plan.rows if row.component == "language"]
    blocks = [name.removesuffix(end) for name in names if name.endswith(end)]
    return [f"{block}.{part}_scale" for block in blocks for part in "kv"]


def _is_linear(plan: Plan, row: PlanRow) -> bool:
    """Planned linears, heads the family keeps, and the linears of blocks that never run."""
    if row.linear or plan.family.reason_kept(row.module):
        return True
    return any(
        row.component == component.name and row.module.endswith(tuple(f".{linear}" for linear in component.linears))
        for component in plan.family.components
    )


def _patterns(plan: Plan, rows: list[PlanRow]) -> list[str]:
    """`re:` patterns that name exactly `rows`: one for each component and set of blocks."""
    found: list[str] = []
    for component in plan.family.components:
        blocks: dict[str, set[int]] = {}
        for row in rows:
            if row.component == component.name:
                blocks.setdefault(row.linear, set()).add(_index(component, row.block))
        together: dict[tuple[int, ...], list[str]] = {}
        for linear, indices in blocks.items():
            together.setdefault(tuple(sorted(indices)), []).append(linear)
        found += [_pattern(component, indices, linears) for indices, linears in together.items()]
    return found


def _index(component: Component, block: str) -> int:
    before, placeholder, after = component.blocks.partition("{i}")
    return int(block.removeprefix(before).removesuffix(after)) if placeholder else 0


def _pattern(component: Component, indices: tuple[int, ...], linears: list[str]) -> str:
    if linears == [component.blocks]:  # the component is one linear
        return f"re:{component.target}$"
    fused = [name for name, members in component.fused.items() if set(members) <= set(linears)]
    names = "|".join(name.replace(".", r"\.") for name in [*linears, *fused])
    number = f"({'|'.join(map(str, indices))})" if len(indices) > 1 else str(indices[0])
    return "re:" + component.target.replace("{i}", number) + rf"\.({names})$"
