"""The models an evaluation asks: the source or an artifact, by transformers in this process or behind a server."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.device import Device, free_bytes, release
from exporter.errors import CheckpointError, DataError
from exporter.evaluation.answers import Answerer, Backend, digest
from exporter.events import Event, Listener, ignore
from exporter.inference.block_streaming import load_streamed
from exporter.inference.encoding import render
from exporter.inference.predict import Predictor
from exporter.inference.predict_server import ServedPredictor, Server, generation
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.processor import load_processor
from exporter.model.processor_files import processor_files
from exporter.model.stream import Read, load_whole
from exporter.numerics.activation_rounding import EXACT, ServedRounding, round_as_served
from exporter.planning.placement import Placement, choose_placement
from exporter.planning.whole_model import whole_model
from exporter.quantization.identity import package_versions
from exporter.tasks.sample import Sample

SOURCE, ARTIFACT = "full precision", "artifact"


@dataclass(frozen=True)
class Servers:
    """Where both models are served. None: the answers must be on disk already."""

    source: Server | None
    artifact: Server | None


def here(
    checkpoint: Checkpoint,
    artifact: Artifact,
    device: Device,
    batch: int,
    on_event: Listener = ignore,
) -> tuple[Answerer, Answerer]:
    """Source and artifact, each loaded by transformers when its turn comes; both with the source's processor.

    batch: the most samples at once; fewer where memory is short. Both models are held in the same way.
    """
    held = placed(checkpoint, artifact.family, device, batch)
    how = _computed(held, device)
    family = artifact.family

    @cache
    def processor() -> Any:
        return load_processor(checkpoint.folder)

    def model(
        label: str, weights: Callable[[], str], names: Sequence[str], read: Read, rounded: ServedRounding = EXACT
    ) -> Answerer:
        @contextmanager
        def opened() -> Iterator[Backend]:
            if held.note:
                on_event(Event("note", 0, 0, held.note))
            load = load_streamed if held.streamed else load_whole
            loaded = load(family, checkpoint.config, names, read, device.torch_device, held.dtype)
            round_as_served(loaded, rounded, gpu=True)
            predictor = Predictor(loaded, processor(), family, device.torch_device, held.batch, on_event)
            del loaded
            try:
                yield predictor
            finally:
                predictor.close()
                gc.collect()  # modules and their hooks hold each other
                release(device)

        identity = _identity(family, weights(), checkpoint) | how | rounded.described()

        def require_unchanged() -> None:
            if weights() != identity["weights"]:
                raise CheckpointError(f"the {label} model changed while it answered", "run the same command again")

        return Answerer(label, identity, lambda sample: _asked(processor(), family, sample), opened, require_unchanged)

    return (
        model(SOURCE, lambda: checkpoint.digest(on_event), list(checkpoint.tensors), checkpoint.read),
        model(ARTIFACT, lambda: weights_digest(artifact), artifact.names(), artifact.read, artifact.rounded()),
    )


def _computed(held: Placement, device: Device) -> dict[str, Any]:
    """What computes the answers in this process."""
    return {
        "backend": "transformers",
        "device": device.torch_device.type,
        "dtype": str(held.dtype).removeprefix("torch."),
        "versions": package_versions(),
    }


def placed(checkpoint: Checkpoint, family: Family, device: Device, batch: int) -> Placement:
    """How a model of this checkpoint's shapes is held in the memory that is free now."""
    stored = next(info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2)
    model = whole_model(checkpoint.tensors, family, checkpoint.config)
    return choose_placement(model, stored, device, free_bytes(device.torch_device), batch)


def _asked(processor: Any, family: Family, sample: Sample) -> str:
    """What decides an answer besides picture and weights: the prompt, or the pool and the place in it.

    Two pictures of a pool can have the same pixels and other texts, and then other ranks.
    """
    if sample.among is None:
        return render(processor, family, sample, None)
    return digest([sample.among.digest, sample.identity, sample.references])


def served(checkpoint: Checkpoint, artifact: Artifact, servers: Servers) -> tuple[Answerer, Answerer]:
    """Source and artifact behind servers. A server's word is taken for which weights it holds.

    Where it says from which folder it serves (vLLM's `root`), another folder than the artifact's is an error.
    """
    family = artifact.family
    if family.unserved:
        raise DataError(f"no server answers for {family.name}: {family.unserved}", "leave --server out")

    def model(label: str, weights: str, server: Server | None, folder: Path | None) -> Answerer:
        @contextmanager
        def opened() -> Iterator[Backend]:
            if server is None:
                raise DataError(f"no server for the {label} model, and its answers are not all kept", _STEPS)
            entry = server.served()
            _check_root(server, entry, folder)
            name = str(entry["id"])
            yield ServedPredictor(server, family, name, server.lacks_start(name))

        identity = _identity(family, weights, checkpoint) | {"backend": "openai", "start_token": "always"}
        return Answerer(label, identity, lambda sample: family.text(sample.question), opened)

    return (
        model(SOURCE, checkpoint.digest(), servers.source, None),
        model(ARTIFACT, weights_digest(artifact), servers.artifact, artifact.checkpoint.folder),
    )


_STEPS = (
    "both models are asked the same way: give --baseline-server beside --server; with one GPU, serve the source and "
    "run with --baseline-server alone first, then serve the artifact and run with --server"
)


def _check_root(server: Server, entry: dict[str, Any], folder: Path | None) -> None:
    root = entry.get("root")
    if folder is None or not isinstance(root, str) or not Path(root).is_dir():
        return
    if Path(root).resolve() != folder.resolve():
        raise DataError(f"{server.base} serves {root}, not {folder}", "serve the artifact, or name another server")


def weights_digest(artifact: Artifact) -> str:
    """Identity of an artifact's weights: the manifest's hashes, and every byte of its shards as they are now."""
    return digest([artifact.manifest.files, artifact.checkpoint.digest()])


def _identity(family: Family, weights: str, texts: Checkpoint) -> dict[str, Any]:
    tasks: dict[str, Any] = {task: generation(family, task) for task in family.max_new_tokens}
    return {"weights": weights, "processor": digest(processor_files(texts.folder)), "generation": tasks}
