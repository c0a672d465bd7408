"""What a manifest must name, from an artifact's headers and config.json alone.

A manifest that leaves something out verifies nothing of it. It names every file of weights, the files that decide what
they mean, and every linear that the tensors or the patterns of the config show to be quantized.
"""

from exporter.artifact.artifact import Artifact
from exporter.errors import ArtifactError
from exporter.planning.vllm_rules import matches

NEEDED = ("config.json", "recipe.yaml")
PACKED = {  # by format: ends of tensor names that only a packed linear has
    "compressed_tensors": (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"),
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
}
SHOWN = 5


def missing_from_manifest(artifact: Artifact) -> list[str]:
    """Everything that the manifest should name and does not; empty when it is complete."""
    manifest = artifact.manifest
    files = {*NEEDED, *artifact.checkpoint.files()} - manifest.files.keys()
    problems = [f"{name}: not in the manifest" for name in sorted(files)]
    if not manifest.linears and not manifest.errors:
        problems.append("the manifest names no quantized linear, so it verifies nothing")
    unnamed = _packed(artifact) - manifest.linears.keys()
    problems += _listed(unnamed, "packed, but not among the manifest's linears")
    described = _described(artifact) - manifest.linears.keys() - unnamed
    problems += _listed(described, "config.json gives it a scheme, but the manifest does not name it")
    problems += _listed(manifest.linears.keys() - manifest.errors.keys(), "the manifest has no error of it")
    outside = {m for m in manifest.errors if not any(m == u or m.startswith(f"{u}.") for u in manifest.units)}
    problems += _listed(outside, "in none of the manifest's units")
    return problems + _unused_groups(artifact)


def _packed(artifact: Artifact) -> set[str]:
    """Modules that have tensors of a packed linear, or weights of integers or 8 bits."""
    ends = PACKED[artifact.manifest.format]
    found = set()
    for name, info in artifact.checkpoint.tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None:
            found.add(name.removesuffix(end))
        elif name.endswith(".weight") and info.dtype.itemsize == 1:
            found.add(name.removesuffix(".weight"))
    return found


def _described(artifact: Artifact) -> set[str]:
    """Modules that config.json gives a scheme and does not list as ignored.

    Of other formats nothing: their patterns match every module, and tensors alone show which are packed.
    """
    if artifact.manifest.format != "compressed_tensors":
        return set()
    described = artifact.checkpoint.config.get("quantization_config") or {}
    ignored = described.get("ignore") or ()
    found = set()
    for name, info in artifact.checkpoint.tensors.items():
        module, dot, last = name.rpartition(".")
        if dot and last == "weight" and len(info.shape) == 2:
            runtime = artifact.family.runtime_name(module)
            targets = [target for group in artifact.groups for target in group.targets]
            if runtime not in ignored and any(matches(target, runtime) for target in targets):
                found.add(module)
    return found


def _unused_groups(artifact: Artifact) -> list[str]:
    """Schemes of config.json that no linear of the manifest has."""
    if artifact.manifest.format != "compressed_tensors":
        return []
    try:
        used = {artifact.scheme_of(module) for module in artifact.manifest.linears}
    except ArtifactError:
        return []  # reported with the linears
    unused = [group.scheme.label() for group in artifact.groups if group.scheme not in used]
    return [f"config.json describes a scheme that no linear has: {label}" for label in unused]


def _listed(modules: set[str], what: str) -> list[str]:
    """A line for each of the first few modules, and one that counts the rest."""
    lines = [f"{module}: {what}" for module in sorted(modules)[:SHOWN]]
    return lines + ([f"{len(modules) - SHOWN} more: {what}"] if len(modules) > SHOWN else [])
