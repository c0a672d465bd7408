"""Check whether vLLM can serve an artifact or a plan on this hardware, before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from exporter.device import capability
from exporter.errors import ServeError
from exporter.model.families import Family
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan
from exporter.planning.plan import engine_linears as planned_linears
from exporter.planning.recipe import Recipe
from exporter.planning.tensor_parallel import head_problems, parallel_problems, shard
from exporter.planning.vllm_kernels import Hardware
from exporter.planning.vllm_rules import Linear, cpu_cache_problems, hardware_problems, head_size, pattern_problems
from exporter.serving.cpu_instructions import CPUINFO, missing_instructions
from exporter.serving.launch import Program
from exporter.serving.negative_control import modules_of
from exporter.serving.other_recipes import other_export, recipe_hint

if TYPE_CHECKING:
    from exporter.artifact.artifact import Artifact


def hardware(program: Program) -> Hardware:
    """Hardware that this vLLM uses on this machine: "cpu", or the GPU's compute capability."""
    return "cpu" if program.cpu else capability()


def refuse_processor(
    program: Program,
    schemes: Iterable[Scheme | None],
    recipe: Recipe,
    family: Family,
    kv_cache: str | None = None,
    head: int | None = None,
) -> None:
    """ServeError when vLLM's CPU build would fail on this machine's processor, at the first request or in its answers.

    schemes: of the packed linears. recipe, family: of the model, for the hint, as `head`: the width of an attention
    head, if it is known. kv_cache: of the artifact.
    """
    if program.cpu and (missing := missing_instructions(schemes, kv_cache)):
        lines = (f"\n  it {need.without}: it needs {need.name} ({' or '.join(need.flags)})" for need in missing)
        raise ServeError(
            f"vLLM's CPU build cannot serve this on the processor that {CPUINFO} lists:{''.join(lines)}",
            f"without {' and '.join(dict.fromkeys(need.name for need in missing))} "
            f"{recipe_hint(recipe, family, 'cpu', head)}",
        )


def processor_note(plan: Plan) -> str | None:
    """What this machine's processor lacks for the planned artifact, which may be for another machine; None: nothing."""
    schemes = (row.scheme for row in plan.rows if row.decision == "packed")
    reasons = [f"{need.without} without {need.name}" for need in missing_instructions(schemes, plan.recipe.kv_cache)]
    return f"this machine's processor cannot serve it: vLLM's CPU build {', and '.join(reasons)}" if reasons else None


def needs_other_recipe(plan: Plan) -> list[str] | None:
    """Words after `mmq` of an export that vLLM serves on this machine, if it has no GPU and its CPU not the kernels.

    None where the planned artifact can be served; empty where no built-in recipe can.
    """
    if capability() is not None:
        return None
    linears = planned_linears(plan.rows, plan.family)
    refused = missing_instructions((linear.scheme for linear in linears), plan.recipe.kv_cache)
    if not refused and not hardware_problems(linears, plan.recipe.format, "cpu"):
        return None
    return other_export(plan.recipe, plan.family, "cpu", plan.head_size)


def refuse_artifact_here(program: Program, artifact: Artifact) -> None:
    """`refuse_processor` for an artifact."""
    schemes = (artifact.scheme_of(name) for name in artifact.manifest.linears)
    head = head_size(artifact.checkpoint.config)
    refuse_processor(program, schemes, artifact.recipe(), artifact.family, artifact.kv_cache, head)


def engine_linears(artifact: Artifact) -> list[Linear]:
    """Packed linears with vLLM's names and shapes `(out, in)`, from the artifact's headers."""
    linears = []
    for module in artifact.manifest.linears:
        scheme, tensors = artifact.scheme_of(module), artifact.checkpoint.tensors
        names = [f"{module}.{name}" for name in ("weight_packed", "weight", "qweight")]
        stored = next(tensors[name] for name in names if name in tensors)
        rows, columns = stored.shape
        if stored.name.endswith("qweight"):  # stored transposed; AutoGPTQ packs along inputs, AutoAWQ along outputs
            packs_inputs = artifact.manifest.format == "gptq"
            rows, columns = columns, rows * 32 // scheme.bits if packs_inputs else rows
            rows = rows if packs_inputs else rows * 32 // scheme.bits
        elif stored.name.endswith("weight_packed"):
            columns = columns * 32 // scheme.bits
        name = artifact.family.runtime_name(module)
        linears.append(Linear(name, artifact.family.engine_name(module), (rows, columns), scheme))
    return linears


def refuse_unserved(family: Family) -> None:
    """ServeError when vLLM does not support this family."""
    if family.unserved:
        raise ServeError(f"{', '.join(family.architectures)}: {family.unserved}")


def needs_plugin(artifact: Artifact) -> bool:
    """Whether the artifact has packed linears that vLLM loads only with mmq's plugin."""
    return any(
        component.unpackable and modules_of(artifact, component.name) for component in artifact.family.components
    )


def refuse_unservable(artifact: Artifact, on: Hardware, tensor_parallel: int) -> None:
    """ServeError with the rules of vLLM that the artifact violates on this hardware."""
    refuse_unserved(artifact.family)
    config, linears = artifact.checkpoint.config, engine_linears(artifact)
    parts = [shard(linear, tensor_parallel) for linear in linears]
    problems = _hardware_rules(parts, artifact.manifest.format, artifact.kv_cache, config, on)
    family = artifact.family
    problems += head_problems(family.heads(config), family.shared_heads(config), tensor_parallel)
    problems += parallel_problems(linears, tensor_parallel)
    if artifact.manifest.format == "compressed_tensors":
        ignored = (config.get("quantization_config") or {}).get("ignore") or ()
        problems += pattern_problems(linears, [(group.scheme, group.targets) for group in artifact.groups], ignored)
    if problems:
        _refuse("this artifact", problems, recipe_hint(artifact.recipe(), family, on, head_size(config)))


def refuse_plan(plan: Plan, config: Mapping[str, Any], on: Hardware) -> None:
    """ServeError with the rules of vLLM that the planned artifact violates. config: config.json of the model."""
    refuse_unserved(plan.family)
    linears = planned_linears(plan.rows, plan.family)
    problems = _hardware_rules(linears, plan.recipe.format, plan.recipe.kv_cache, config, on)
    if problems:
        hint = recipe_hint(plan.recipe, plan.family, on, plan.head_size)
        _refuse(f"an artifact of recipe '{plan.recipe.name}'", problems, hint)


def _hardware_rules(
    linears: Sequence[Linear], format_name: str, kv_cache: str | None, config: Mapping[str, Any], on: Hardware
) -> list[str]:
    """Violations of the rules `kernel` and `kv-cache` on the serving hardware."""
    cache = cpu_cache_problems(kv_cache, head_size(config)) if on == "cpu" else []
    return hardware_problems(linears, format_name, on) + cache


def _refuse(what: str, problems: Sequence[str], hint: str) -> NoReturn:
    lines = "\n".join(f"  {problem}" for problem in problems[:10])
    raise ServeError(f"vllm cannot serve {what} on this hardware:\n{lines}", hint)
