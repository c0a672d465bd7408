"""Back ends of an evaluation: source and artifact run by transformers in this process, or by a server."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.data.tasks.sample import Sample
from exporter.device import Device, free_bytes, release
from exporter.errors import CheckpointError, DataError
from exporter.evaluation.answers import Answerer, Backend, Store, digest
from exporter.events import Listener, ignore, notice
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.families.component import Config
from exporter.model.inference.block_streaming import load_streamed
from exporter.model.inference.encoding import render
from exporter.model.inference.predict import Predictor
from exporter.model.inference.predict_server import ServedPredictor, Server, generation
from exporter.model.processors.files import processor_files
from exporter.model.processors.processor import load_processor
from exporter.model.stream import Read, load_whole
from exporter.numerics.activation_rounding import EXACT, ServedRounding, round_as_served
from exporter.planning.placement import Placement, choose_placement
from exporter.planning.whole_model import whole_model
from exporter.quantization.identity import package_versions

SOURCE, ARTIFACT = "full precision", "artifact"


@dataclass(frozen=True)
class Servers:
    """Servers of both models. None: the answers of that model must already be on disk."""

    source: Server | None
    artifact: Server | None


def local_answerers(
    checkpoint: Checkpoint,
    artifact: Artifact,
    device: Device,
    batch: int,
    on_event: Listener = ignore,
    *,
    family: Family | None = None,
) -> tuple[Answerer, Answerer]:
    """Answerers that load source and artifact with transformers on demand; both use the source's processor.

    batch: largest number of samples at once; less where memory is short. Both models use the same placement.
    family: with the prompts of the evaluation; None takes those of the artifact.
    """
    family = family or artifact.family
    placement = placement_of(checkpoint, family, device, batch)
    settings = _computed(placement, device)

    @cache
    def processor() -> Any:
        return load_processor(checkpoint.folder)

    def model(
        label: str, weights: Callable[[], str], names: Sequence[str], read: Read, rounded: ServedRounding = EXACT
    ) -> Answerer:
        def opened() -> AbstractContextManager[Backend]:
            config = checkpoint.config
            return opened_predictor(family, config, names, read, rounded, placement, device, processor, on_event)

        identity = _identity(family, weights(), checkpoint) | settings | rounded.described()

        def require_unchanged() -> None:
            if weights() != identity["weights"]:
                raise CheckpointError(f"the {label} model changed during the run", "run the same command again")

        return Answerer(label, identity, lambda sample: _query(processor(), family, sample), opened, require_unchanged)

    return (
        model(SOURCE, lambda: checkpoint.digest(on_event), list(checkpoint.tensors), checkpoint.read),
        model(ARTIFACT, lambda: weights_digest(artifact), artifact.names(), artifact.read, artifact.rounded()),
    )


@contextmanager
def opened_predictor(
    family: Family,
    config: Config,
    names: Sequence[str],
    read: Read,
    rounded: ServedRounding,
    placement: Placement,
    device: Device,
    processor: Callable[[], Any],
    on_event: Listener = ignore,
) -> Iterator[Predictor]:
    """A predictor of a model loaded with transformers; its memory is freed at the end.

    names, read: the model's tensors. rounded: rounding of activations and cache. processor: loads the processor.
    """
    if placement.note:
        on_event(notice(placement.note))
    load = load_streamed if placement.streamed else load_whole
    loaded = load(family, config, names, read, device.torch_device, placement.dtype.torch)
    round_as_served(loaded, rounded, gpu=True)
    predictor = Predictor(loaded, processor(), family, device.torch_device, placement.batch, on_event)
    del loaded
    try:
        yield predictor
    finally:
        predictor.close()
        gc.collect()  # modules and their hooks form reference cycles
        release(device)


def _computed(placement: Placement, device: Device) -> dict[str, Any]:
    """Back end, device, dtype and package versions, for the identity of answers from this process."""
    return {
        "backend": "transformers",
        "device": device.kind,
        "dtype": placement.dtype.name,
        "versions": package_versions(),
    }


def placement_of(checkpoint: Checkpoint, family: Family, device: Device, batch: int) -> Placement:
    """Placement (whole or streamed, batch, dtype) of a model of this checkpoint's shapes in the memory now free."""
    stored = next(info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2)
    model = whole_model(checkpoint.tensors, family, checkpoint.config)
    return choose_placement(model, stored, device, free_bytes(device.torch_device), batch)


def _query(processor: Any, family: Family, sample: Sample) -> str:
    """Key of a sample besides picture and weights: its prompt; for retrieval its pool and position in the pool.

    Two pictures of a pool may have the same pixels but different texts, and therefore different ranks.
    """
    if sample.among is None:
        return render(processor, family, sample, None)
    return digest([sample.among.digest, sample.identity, sample.references])


def served_answerers(
    checkpoint: Checkpoint, artifact: Artifact, servers: Servers, family: Family | None = None
) -> tuple[Answerer, Answerer]:
    """Answerers of source and artifact behind servers. mmq trusts the server about which weights it serves.

    When the server reports its model folder (vLLM's `root`), DataError if it is not the artifact's folder. family: with
    the prompts of the evaluation; None takes those of the artifact.
    """
    family = family or artifact.family
    if family.unserved:
        raise DataError(f"mmq cannot evaluate {family.name} behind a server: {family.unserved}", "leave out --server")

    def model(label: str, weights: str, server: Server | None, folder: Path | None) -> Answerer:
        @contextmanager
        def opened() -> Iterator[Backend]:
            if server is None:
                raise DataError(
                    f"the {label} model has no server, and some of its answers are not in the answer store", STEPS
                )
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


def refuse_hopeless(servers: Servers, store: Store | None) -> None:
    """DataError for what cannot succeed, before anything is read, unless stored answers may replace a server.

    That is a missing server of the source, or a server that does not respond.
    """
    if store is not None and store.has_served():
        return
    if servers.source is None:
        raise DataError(f"the {SOURCE} model has no server, and {NOT_STORED}", STEPS)
    for server in filter(None, (servers.source, servers.artifact)):
        server.require_connection(NOT_STORED)


NOT_STORED = "no answer of a server is stored"
STEPS = (
    "both models need a server: give --baseline-server and --server; with one GPU, first serve the source and run with "
    "--baseline-server only, then serve the artifact and run with --server"
)


def _check_root(server: Server, entry: dict[str, Any], folder: Path | None) -> None:
    root = entry.get("root")
    if folder is None or not isinstance(root, str) or not Path(root).is_dir():
        return
    if Path(root).resolve() != folder.resolve():
        raise DataError(f"{server.base} serves {root}, not {folder}", "serve the artifact, or name another server")


def weights_digest(artifact: Artifact) -> str:
    """Identity of an artifact's weights: sha256 of the manifest's hashes and of the shards' current content."""
    return digest([artifact.manifest.files, artifact.checkpoint.digest()])


def _identity(family: Family, weights: str, texts: Checkpoint) -> dict[str, Any]:
    tasks: dict[str, Any] = {task: generation(family, task) for task in family.max_new_tokens}
    return {"weights": weights, "processor": digest(processor_files(texts.folder)), "generation": tasks}
