"""Check that the baseline model is the source of an artifact, by the hashes in its manifest."""

from dataclasses import asdict, dataclass
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import Manifest, as_line
from exporter.errors import CheckpointError
from exporter.events import Listener, ignore
from exporter.files.mapping_diff import changes
from exporter.model.checkpoint import Checkpoint
from exporter.model.processors.files import processor_files


@dataclass(frozen=True)
class Baseline:
    """The model that an artifact is compared with. model: its origin. differs: differences from the source."""

    model: str
    is_source: bool
    differs: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self) | {"model": as_line(self.model), "differs": [as_line(line) for line in self.differs]}


def compare(manifest: Manifest, checkpoint: Checkpoint, on_event: Listener = ignore) -> Baseline:
    """Compare the hashes of shards, configuration and processor files that the manifest names."""
    source = manifest.source
    made_from, now = dict(source.shards), checkpoint.shard_hashes(on_event)
    if source.processor:
        made_from |= source.processor
        now |= processor_files(checkpoint.folder)
    differs = changes({"files": made_from}, {"files": now})
    if not differs and source.digest not in (None, checkpoint.digest()):
        differs = ["config.json, or the dtype in which tensors are read"]
    return Baseline(checkpoint.origin, not differs, tuple(differs))


def require_source(
    artifact: Artifact, checkpoint: Checkpoint, allow_other: bool, on_event: Listener = ignore
) -> Baseline:
    """Compare a checkpoint with the artifact's source; CheckpointError when it differs and `allow_other` is False."""
    baseline = compare(artifact.manifest, checkpoint, on_event)
    if not baseline.is_source and not allow_other:
        differences = "".join(f"\n  {line}" for line in baseline.differs)
        source = artifact.manifest.source.model
        raise CheckpointError(
            f"{checkpoint.origin} is not the source model of {artifact.checkpoint.folder} ({source}):{differences}",
            f"give the source model as --baseline (its name in the manifest is {source}), or add --other-baseline: "
            "report and card then name this baseline",
        )
    return baseline
