"""Check that a manifest is complete, from the artifact's headers and config.json.

`verify` checks only files and linears that the manifest names. The manifest must therefore name every shard and no
other weights, the files that determine how weights are read, and every linear that is quantized by its tensors or by
the patterns of the config.
"""

from exporter.artifact.artifact import Artifact
from exporter.errors import ArtifactError
from exporter.planning.vllm_rules import matches

NEEDED = ("config.json", "recipe.yaml")
PACKED = {  # format -> suffixes of tensor names that only a packed linear has
    "compressed_tensors": (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"),
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
}
SHOWN = 5  # modules per problem


def missing_from_manifest(artifact: Artifact) -> list[str]:
    """One line per file or linear that is missing from the manifest; empty when the manifest is complete."""
    manifest = artifact.manifest
    files = {*NEEDED, *artifact.checkpoint.files()} - manifest.files.keys()
    problems = [f"{name}: not in the manifest" for name in sorted(files)]
    unread = {name for name in manifest.files if name.endswith(".safetensors")} - {*artifact.checkpoint.files()}
    problems += [f"{name}: not part of the model, but vLLM would load it" for name in sorted(unread)]
    if not manifest.linears and not manifest.errors:
        problems.append("the manifest names no quantized linear, so it verifies nothing")
    unnamed = _packed(artifact) - manifest.linears.keys()
    problems += _listed(unnamed, "packed, but not among the manifest's linears")
    described = _described(artifact) - manifest.linears.keys() - unnamed
    problems += _listed(described, "config.json gives it a scheme, but the manifest does not name it")
    problems += _listed(
        manifest.linears.keys() - manifest.errors.keys(), "the manifest has no quantization error for it"
    )
    outside = {m for m in manifest.errors if not any(m == u or m.startswith(f"{u}.") for u in manifest.units)}
    problems += _listed(outside, "in none of the manifest's units")
    return problems + _unused_groups(artifact)


def _packed(artifact: Artifact) -> set[str]:
    """Modules that have tensors of a packed linear, or an 8-bit weight."""
    ends = PACKED[artifact.manifest.format]
    modules = set()
    for name, info in artifact.checkpoint.tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None:
            modules.add(name.removesuffix(end))
        elif name.endswith(".weight") and info.dtype.itemsize == 1:
            modules.add(name.removesuffix(".weight"))
    return modules


def _described(artifact: Artifact) -> set[str]:
    """Modules that match a scheme in config.json and are not in its ignore list.

    Empty for formats other than compressed_tensors: their patterns match every module, so only tensors are evidence.
    """
    if artifact.manifest.format != "compressed_tensors":
        return set()
    described = artifact.checkpoint.config.get("quantization_config") or {}
    ignored = described.get("ignore") or ()
    modules = set()
    for name, info in artifact.checkpoint.tensors.items():
        module, dot, last = name.rpartition(".")
        if dot and last == "weight" and len(info.shape) == 2:
            runtime = artifact.family.runtime_name(module)
            targets = [target for group in artifact.groups for target in group.targets]
            if runtime not in ignored and any(matches(target, runtime) for target in targets):
                modules.add(module)
    return modules


def _unused_groups(artifact: Artifact) -> list[str]:
    """One line per scheme of config.json that no linear of the manifest uses."""
    if artifact.manifest.format != "compressed_tensors":
        return []
    try:
        used = {artifact.scheme_of(module) for module in artifact.manifest.linears}
    except ArtifactError:
        return []  # reported with the linears
    unused = [group.scheme.label() for group in artifact.groups if group.scheme not in used]
    return [f"config.json has a scheme that no linear uses: {label}" for label in unused]


def _listed(modules: set[str], what: str) -> list[str]:
    """One line per module for the first `SHOWN` modules, and one line with the number of the others."""
    lines = [f"{module}: {what}" for module in sorted(modules)[:SHOWN]]
    return lines + ([f"{len(modules) - SHOWN} more: {what}"] if len(modules) > SHOWN else [])
