"""Check a manifest's record of the full-precision model: its digest, its name, its adapter.

The source's digest is a hash of its config.json, the hashes of its weight files and its dtypes (`Checkpoint.digest`).
Artifact and manifest hold all three, so an edit of one of them contradicts the digest.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.artifact.artifact_config import needs_bfloat16
from exporter.artifact.manifest import as_line
from exporter.errors import one_line
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.planning.plan import Plan
from exporter.publishing.artifact_summary import Summary

DTYPES = ("float16", "bfloat16", "float32")
DTYPE_KEYS = ("dtype", "torch_dtype")
MOST_PLACES = 4  # dtype keys: of the model, its text model, its vision tower and its Q-Former


def source_problems(plan: Plan, summary: Summary, artifact: Artifact) -> list[str]:
    """One line per contradiction between manifest, recipe and config.json about the source."""
    source, model = summary.manifest.source, summary.recipe.model
    problems = []
    if source.digest is not None and source.digest not in _digests(plan, artifact):
        problems.append("config.json or the manifest's record of the source was edited: they contradict its digest")
    if source.model in MODELS and source.digest not in (None, Checkpoint.open(MODELS[source.model]).digest()):
        problems.append(f"the manifest names {source.model} as the source, but its digest is another model's")
    if source.model.partition("@")[0] not in _names(model.repo):
        problems.append(f"the manifest names {source.model} as the source, the recipe {model.repo}")
    if (source.adapter is None) != (model.adapter is None):
        problems.append("manifest and recipe contradict each other about a LoRA adapter")
    return problems


def _names(repo: str) -> set[str]:
    """What a manifest may call a recipe's model: its hub id or embedded name, or the name of its folder."""
    path = Path(repo).expanduser()
    return {as_line(name) for name in (repo, one_line(path.name or path.resolve().name))}


def _digests(plan: Plan, artifact: Artifact) -> Iterator[str]:
    """The digests of all sources that would give this config.json and these tensors."""
    shards = dict(artifact.manifest.source.shards)
    for config, dtypes in product(_configs(plan, artifact.source_config()), _dtypes(plan)):
        content = {"config": config, "shards": shards, "dtypes": dtypes}
        yield hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _dtypes(plan: Plan) -> Iterator[dict[str, int]]:
    """`Checkpoint.dtypes` of the source; weights that are stored dequantized in 16 bits may have been float32."""
    for wide in (False, True):
        kinds = ["float32" if wide and row.decision == "dequantized" else row.tensor.dtype for row in plan.rows]
        yield dict(Counter(map(str, kinds)))


def _configs(plan: Plan, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The source's config.json: that of the artifact, or with other dtypes where the plan sets bfloat16."""
    yield config
    if needs_bfloat16(plan):
        places = min(MOST_PLACES, sum(1 for _ in _dtype_places(config)))
        for dtypes in product((*DTYPES, None), repeat=places):
            yield _with_dtypes(config, iter(dtypes))


def _dtype_places(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key in DTYPE_KEYS and value is not None:
            yield key
        elif key.endswith("_config") and isinstance(value, dict):
            yield from _dtype_places(value)


def _with_dtypes(config: Mapping[str, Any], dtypes: Iterator[str | None]) -> dict[str, Any]:
    """The config with other values of its dtype keys, in the order of `_dtype_places`; None removes the key."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in DTYPE_KEYS and value is not None:
            dtype = next(dtypes, value)
            changed |= {} if dtype is None else {key: dtype}
        elif key.endswith("_config") and isinstance(value, dict):
            changed[key] = _with_dtypes(value, dtypes)
        else:
            changed[key] = value
    return changed
