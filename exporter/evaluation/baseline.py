"""Whether a full-precision model is the one that an artifact was made from, by the hashes in its manifest."""

from dataclasses import asdict, dataclass
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import Manifest, as_line
from exporter.errors import CheckpointError
from exporter.events import Listener, ignore
from exporter.files.mapping_diff import changes
from exporter.model.checkpoint import Checkpoint
from exporter.model.processor_files import processor_files


@dataclass(frozen=True)
class Baseline:
    """A model that an artifact is compared with. model: where it comes from. differs: from the artifact's source."""

    model: str
    is_source: bool
    differs: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self) | {"model": as_line(self.model), "differs": [as_line(line) for line in self.differs]}


def compare(manifest: Manifest, checkpoint: Checkpoint, on_event: Listener = ignore) -> Baseline:
    """Compare every shard, the configuration and the processor's files, as far as the manifest names them."""
    source = manifest.source
    made_from, now = dict(source.shards), checkpoint.shard_hashes(on_event)
    if source.processor:
        made_from |= source.processor
        now |= processor_files(checkpoint.folder)
    differs = changes({"files": made_from}, {"files": now})
    if not differs and source.digest not in (None, checkpoint.digest()):
        differs = ["config.json, or the dtype that tensors are read as"]
    return Baseline(checkpoint.origin, not differs, tuple(differs))


def require_source(
    artifact: Artifact, checkpoint: Checkpoint, allow_other: bool, on_event: Listener = ignore
) -> Baseline:
    """The comparison with the artifact's source; CheckpointError when it is another model and that is not allowed."""
    baseline = compare(artifact.manifest, checkpoint, on_event)
    if not baseline.is_source and not allow_other:
        listed = "".join(f"\n  {line}" for line in baseline.differs)
        source = artifact.manifest.source.model
        raise CheckpointError(
            f"{checkpoint.origin} is not the model that {artifact.checkpoint.folder} was made from ({source}):{listed}",
            f"give the model that it was made from as --baseline (the manifest calls it {source}), or add "
            "--other-baseline: report and card then name this one",
        )
    return baseline
