"""`mmq bench`: speed and memory of an artifact and of its source, in vLLM or with transformers.

Both models run one after the other with the same settings and pictures. Without vLLM, each model runs in its own
process with transformers, which computes with dequantized weights: then only the sizes on disk differ, and the figures
say what a machine without vLLM can expect.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from exporter import data
from exporter.artifact.artifact import Artifact
from exporter.artifact.output_folder import reading, updating
from exporter.device import choose, peak_bytes, reset_peak, synchronize
from exporter.evaluation.backends import weights_digest
from exporter.evaluation.report_file import write_speed
from exporter.evaluation.speed_record import WARM_UP, SpeedFigures, SpeedRecord
from exporter.events import Listener, ignore, notice
from exporter.model.families import Family
from exporter.model.source import open_source
from exporter.pipeline.ask import opened_model, source_of
from exporter.pipeline.serving_check import questions
from exporter.serving.launch import Program, launch
from exporter.serving.plugin import with_plugin
from exporter.serving.preflight import hardware, needs_plugin, refuse_artifact_here, refuse_unservable, refuse_unserved
from exporter.serving.speed import SpeedSettings, serve_and_measure
from exporter.serving.vllm_engine import free_port
from exporter.transformers_import import only_mmq_runs_here

PICTURES = 16  # different pictures that the requests cycle through


@dataclass(frozen=True)
class SpeedRequest:
    """What to measure. program: vLLM, None for transformers. baseline: where the source is, if elsewhere.

    alone: without the source. extra: flags of vLLM.
    """

    artifact: Path
    program: Program | None
    settings: SpeedSettings
    sources: tuple[data.SourceSpec, ...] = ()
    device: str = "auto"
    baseline: str | None = None
    alone: bool = False
    extra: tuple[str, ...] = ()


def bench_artifact(request: SpeedRequest, on_event: Listener) -> SpeedRecord:
    """Measure the artifact and its source, and store the result in the artifact's report.

    ServeError when vLLM cannot serve the artifact or does not start; errors of `source_of` for the source.
    """
    with reading(request.artifact, on_event):
        measure = partial(_in_vllm, request, on_event) if request.program else partial(_here, request, on_event)
        if request.program:
            opened = Artifact.open(request.artifact)
            refuse_unserved(opened.family)
            refuse_unservable(opened, hardware(request.program), 1)
            refuse_artifact_here(request.program, opened)
        source = None if request.alone else source_of(str(request.artifact), request.baseline, on_event)
        figures = measure(str(request.artifact))
        record = SpeedRecord(
            engine=_engine_text(request),
            device=_device_text(request),
            tokens=request.settings.tokens,
            requests=request.settings.requests,
            warm_up=WARM_UP,
            flags=request.extra,
            weights=weights_digest(Artifact.open(request.artifact)),
            artifact=figures,
            source=None if source is None else measure(source),
        )
        with updating(request.artifact):
            write_speed(request.artifact, record)
    return record


def _engine_text(request: SpeedRequest) -> str:
    """What computes the answers, with its version."""
    if request.program:
        return f"vllm {request.program.version}"
    return f"transformers {version('transformers')}, with dequantized weights"


def _device_text(request: SpeedRequest) -> str:
    device = choose(request.device)
    name = device.name if device.is_cuda else "CPU"
    return name if request.program is None else f"{name}, {'cpu' if request.program.cpu else 'gpu'} build"


def _in_vllm(request: SpeedRequest, on_event: Listener, model: str) -> SpeedFigures:
    """Figures of a model that vLLM serves."""
    assert request.program is not None
    checkpoint, family = open_source(model)
    samples = questions(request.artifact, request.sources, PICTURES)
    artifact = Artifact.open(request.artifact) if Path(model) == request.artifact else None
    command = launch(
        checkpoint.folder,
        checkpoint.config,
        request.program,
        port=free_port(),
        family=family,
        kv_cache=artifact.manifest.kv_cache if artifact else None,
        extra=request.extra,
    )
    if artifact and needs_plugin(artifact):
        command = with_plugin(command, request.program.version)
    on_event(notice(f"starting vllm {request.program.version} on {checkpoint.folder.name}"))
    with tempfile.TemporaryDirectory(prefix="mmq-bench-") as folder:
        log, gpu = Path(folder) / "engine.log", not request.program.cpu
        return serve_and_measure(command, family, samples, request.settings, gpu, log, on_event)


def _here(request: SpeedRequest, on_event: Listener, model: str) -> SpeedFigures:
    """Figures of a model with transformers, in a process of its own, so that its peak is its own."""
    on_event(notice(f"measuring {Path(model).name} with transformers"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), only_mmq_runs_here) as pool:
        return pool.submit(measure_here, request, model).result()


def measure_here(request: SpeedRequest, model: str) -> SpeedFigures:
    """Figures of a model with transformers in this process. One batch replaces the requests of several clients."""
    device = choose(request.device)
    samples, settings = questions(request.artifact, request.sources, PICTURES), request.settings
    reset_peak(device)
    start = time.perf_counter()
    with opened_model(model, _unchanged, device, ignore) as predictor:
        load_seconds = time.perf_counter() - start

        def seconds(clients: int, tokens: int) -> float:
            synchronize(device)
            begin = time.perf_counter()
            predictor.generate_exactly([samples[i % len(samples)] for i in range(clients)], tokens)
            synchronize(device)
            return time.perf_counter() - begin

        def warm_up(clients: int, tokens: int) -> None:
            for _ in range(WARM_UP):
                seconds(clients, tokens)

        warm_up(1, 1)
        first = sorted(seconds(1, 1) for _ in range(settings.requests))[settings.requests // 2]
        rates = {}
        for clients in sorted({1, *settings.clients}):
            warm_up(clients, settings.tokens)
            spent = sum(seconds(clients, settings.tokens) for _ in range(settings.requests))
            rates[str(clients)] = round(clients * settings.tokens * settings.requests / spent, 2)
        gpu, host = peak_bytes(device)
    return SpeedFigures(
        load_seconds=round(load_seconds, 2),
        first_token_seconds=round(first, 4),
        tokens_per_second=rates,
        peak_bytes=host,
        gpu_bytes=gpu if device.is_cuda else None,
    )


def _unchanged(family: Family) -> Family:
    return family
