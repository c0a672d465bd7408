"""An artifact as a mapping from names of the source checkpoint to dequantized tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import Manifest
from exporter.device import Device
from exporter.evaluation.report_file import Report, read_report


class OpenedArtifact(Mapping[str, Tensor]):
    """An artifact's tensors by their names in the source checkpoint, read and dequantized on access.

    manifest: what the artifact contains and where it came from. report: its scores, None without evaluation.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        self._artifact = Artifact.open(folder, device.torch_device)
        self._names = dict.fromkeys(self._artifact.names())
        self.manifest: Manifest = self._artifact.manifest
        self.report: Report | None = read_report(folder)[0]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor on the chosen device: float32 `[out, in]` where it is packed, else as it is stored."""
        if name not in self._names:
            raise KeyError(name)
        return self._artifact.read(name).to(self._artifact.device)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
