"""Compare an artifact's blocks, dequantized by mmq, with the same blocks decompressed by compressed-tensors.

transformers builds the model for the artifact's config.json twice on the meta device: plain, and prepared by its
quantizer as for loading the artifact. The forward pass of the plain model then runs on one picture and question, with
one block of each model in memory at a time. Each block runs with the weights that mmq dequantizes; then the block of
the prepared model receives the stored tensors, compressed-tensors decompresses them, and the block runs on the same
arguments.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from exporter.artifact.artifact import CACHE_SCALES, Artifact
from exporter.device import Device
from exporter.dtypes import DTYPES, Dtype
from exporter.errors import ArtifactError
from exporter.events import Event, Listener
from exporter.model.inference.forward_hooks import first_output
from exporter.model.stream import Stream, build_skeleton

TOLERANCE = 1e-3  # of the largest output: the order of summation may differ; weights are compared exactly


@dataclass(frozen=True)
class BlockComparison:
    """Result of the comparison. blocks: number of blocks that ran. difference: largest difference of a block's outputs
    relative to its largest output; 0 when all outputs are bit-identical.
    """

    blocks: int
    difference: float


def compare_blocks(
    artifact: Artifact, inputs: Mapping[str, Tensor], device: Device, on_event: Listener
) -> BlockComparison:
    """Run the model once, streamed, and compare each block with its decompression by compressed-tensors.

    inputs: one batch of the processor's output, on the CPU. ArtifactError lists every linear whose decompressed weight
    differs from the dequantized one, every block whose outputs differ, and every name that one side lacks.
    """
    family, config = artifact.family, artifact.source_config()
    stored = _stored_dtype(artifact.checkpoint.config)
    plain = Stream(family, config, device.torch_device, device.compute_dtype(stored).torch)
    prepared = _TransformersModel(artifact, device, stored.torch, plain.dtype)
    problems = prepared.name_problems()
    if problems:
        raise ArtifactError("\n".join(["transformers expects other tensors than the artifact has:", *problems]))
    walk = _ComparisonPass(artifact, plain, prepared, on_event)
    with torch.no_grad(), walk.hooked():
        family.outputs(plain.model, plain.inputs(inputs))
    if walk.problems:
        lines = "\n".join(f"  {problem}" for problem in walk.problems)
        raise ArtifactError(f"transformers reads other weights than mmq computed:\n{lines}")
    return BlockComparison(walk.ran, walk.difference)


def _stored_dtype(config: Mapping[str, Any]) -> Dtype:
    """The dtype in which transformers loads the model: `dtype` of config.json, else float32."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    return next(dtype for dtype in DTYPES.values() if dtype.name == name)


class _TransformersModel:
    """The model that transformers' quantizer prepares; a block holds tensors only while it runs."""

    def __init__(self, artifact: Artifact, device: Device, stored: torch.dtype, compute: torch.dtype) -> None:
        self._artifact, self._device, self._stored, self._compute = artifact, device.torch_device, stored, compute
        self.model: Any = build_skeleton(artifact.family, artifact.source_config(), device.torch_device)
        self._aliases = _tied(self.model)
        if described := artifact.checkpoint.config.get("quantization_config"):
            _prepare(self.model, described)
        live = artifact.family.live_name
        self._checkpoint_names = {live(name): name for name in artifact.checkpoint.tensors}
        self._linears = {live(f"{module}.weight"): module for module in artifact.manifest.linears}
        self._wide = tuple(live(name) for name in artifact.family.float32)

    def name_problems(self) -> list[str]:
        """One line per tensor that only the artifact or only the prepared model has."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        expected = {name for name in parameters if not name.endswith(CACHE_SCALES)} - self._aliases.keys()
        stored = {name for name in self._checkpoint_names if not name.endswith(CACHE_SCALES)} - self._aliases.keys()
        missing = [f"  {name}: transformers expects it, the artifact lacks it" for name in sorted(expected - stored)]
        packed = {self._artifact.family.live_name(name) for name in self._artifact.packed_names()}
        extra = [
            f"  {name}: the artifact has it, transformers has no such parameter" for name in sorted(packed - expected)
        ]
        return missing + extra

    @contextmanager
    def loaded(self, path: str, plain: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
        """The block at live name `path` with its stored tensors decompressed, and the problems of its tensors.

        plain: the same block with the weights that mmq dequantizes.
        """
        block = self.model.get_submodule(path)
        before = [(module, dict(module._parameters)) for module in block.modules()]
        problems: list[str] = []
        counterparts = dict(plain.named_modules())  # without the modules that the quantizer adds, such as a KV cache
        for name, module in block.named_modules():
            self._fill(f"{path}.{name}" if name else path, module, counterparts.get(name), problems)
        try:
            yield block, problems
        finally:
            for module, parameters in before:
                module._parameters.clear()
                module._parameters.update(parameters)

    def _fill(self, path: str, module: nn.Module, plain: nn.Module | None, problems: list[str]) -> None:
        wide = path.startswith(self._wide)
        scheme = getattr(
            module, "quantization_scheme", None
        )  # attention has a scheme for its KV cache, without weights
        quantized = scheme is not None and scheme.weights is not None
        for attribute, parameter in list(module._parameters.items()):
            if parameter is not None:
                tensor = self._artifact.checkpoint.read(self._checkpoint_names[f"{path}.{attribute}"])
                if tensor.shape != parameter.shape and not quantized:
                    problems.append(f"{path}.{attribute}: {list(tensor.shape)} instead of {list(parameter.shape)}")
                    return
                dtype = torch.float32 if wide else self._stored
                floating = tensor.is_floating_point() and tensor.itemsize > 1
                tensor = tensor.to(self._device, dtype if floating else None)
                module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        if quantized:
            self._decompress(path, module, plain, problems)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(torch.float32 if wide else self._compute)

    def _decompress(self, path: str, module: Any, plain: Any, problems: list[str]) -> None:
        from compressed_tensors.compressors import decompress_module
        from compressed_tensors.quantization import QuantizationStatus

        module.quantization_status = QuantizationStatus.COMPRESSED
        decompress_module(module)
        weight, expected = module.weight.to(plain.weight.dtype), plain.weight
        if module.weight.dtype != self._stored:  # the plain block's weight was rounded to another dtype
            weight = module.weight
            expected = self._artifact.linear(self._linears[f"{path}.weight"]).dequantize(weight.dtype)
        if not torch.equal(weight, expected):
            problems.append(f"{path}: compressed-tensors decompresses another weight than mmq computed")


def _prepare(model: Any, quantization_config: Mapping[str, Any]) -> None:
    """Replace the linears of a plain model on the meta device by packed linears, as `from_pretrained` does."""
    import compressed_tensors.compressors  # noqa: F401 (creates its tables on the CPU, not on the meta device)
    from transformers.quantizers import AutoHfQuantizer

    with redirect_stderr(StringIO()), torch.device("meta"):  # the library draws progress bars
        quantizer = AutoHfQuantizer.from_config(dict(quantization_config), pre_quantized=True)
        quantizer.validate_environment()
        quantizer.preprocess_model(model=model)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            scheme.input_activations = None  # only weights are compared; vLLM rounds inputs and caches itself


def _tied(model: Any) -> dict[str, str]:
    """Name of a tied parameter -> name of the parameter whose tensor it shares."""
    model.tie_weights()
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases


class _ComparisonPass:
    """Hooks that load the tensors of each module of the plain model while it runs, and compare each block."""

    def __init__(self, artifact: Artifact, plain: Stream, prepared: _TransformersModel, on_event: Listener) -> None:
        self._artifact, self._plain, self._prepared, self._on_event = artifact, plain, prepared, on_event
        self._names = {artifact.family.live_name(name): name for name in artifact.names()}
        for alias, name in _tied(plain.model).items():
            if alias not in self._names and name in self._names:
                self._names[alias] = self._names[name]
        for live, _ in list(plain.model.named_parameters(remove_duplicate=False)):
            _set(plain, live, None)
        self._blocks = dict.fromkeys(_block_paths(artifact))
        self.problems: list[str] = []
        self.difference = 0.0
        self.ran = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the hooks inside the `with` block: modules receive their tensors when they are called."""
        handles = []
        for path, names in _owners(self._plain.model, self._blocks):
            module = self._plain.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(self._loading(module, names)))
            after = self._comparing(path, module, names) if path in self._blocks else self._unloading(module, names)
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _loading(self, module: nn.Module, names: list[str]) -> Callable[..., None]:
        def load(_: nn.Module, args: Any) -> None:
            for name in names:
                _set(self._plain, name, self._artifact_tensor(name))

        return load

    def _artifact_tensor(self, live: str) -> Tensor:
        if live not in self._names:
            raise ArtifactError(f"the artifact lacks {live}")
        name = self._names[live]
        module = name.removesuffix(".weight")
        wide = name.startswith(self._artifact.family.float32)
        stored = torch.float32 if wide else self._prepared._stored
        packed = module in self._artifact.manifest.linears
        tensor = self._artifact.linear(module).dequantize(stored) if packed else self._artifact.read(name)
        return tensor.to(self._plain.device, stored).to(torch.float32 if wide else self._plain.dtype)

    def _unloading(self, module: nn.Module, names: list[str]) -> Callable[..., None]:
        def unload(*_: Any) -> None:
            for name in names:
                _set(self._plain, name, None)

        return unload

    def _comparing(self, path: str, module: nn.Module, names: list[str]) -> Callable[..., None]:
        unload = self._unloading(module, names)

        def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with self._prepared.loaded(path, module) as (block, problems):
                self.problems += problems
                unload()
                if not problems:
                    self._judge(path, first_output(output).float(), first_output(block(*args, **kwargs)).float())
            self.ran += 1
            self._on_event(Event("verify", min(self.ran, len(self._blocks)), len(self._blocks), path))

        return compare

    def _judge(self, path: str, plain: Tensor, prepared: Tensor) -> None:
        size = float(plain.abs().max())
        difference = float((plain - prepared).abs().max()) / max(size, 1e-30)
        self.difference = max(self.difference, difference)
        if not difference <= TOLERANCE:
            self.problems.append(f"{path}: its outputs differ by {difference:.1e} of the largest output")


def _set(stream: Stream, live: str, tensor: Tensor | None) -> None:
    """Give the live parameter a tensor; None removes its tensor and keeps its shape."""
    path, _, attribute = live.rpartition(".")
    module = stream.model.get_submodule(path)
    parameter = getattr(module, attribute)
    if tensor is not None and tensor.shape != parameter.shape:
        raise ArtifactError(f"{live} has shape {list(tensor.shape)}; config.json requires {list(parameter.shape)}")
    if tensor is None:  # uses no memory, but has the shape, dtype and device that forward passes read
        tensor = torch.zeros(1, dtype=_dtype(stream, live), device=stream.device).expand(parameter.shape)
    module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _dtype(stream: Stream, live: str) -> torch.dtype:
    """The dtype in which a parameter is stored while it is loaded."""
    wide = tuple(stream.family.live_name(name) for name in stream.family.float32)
    return torch.float32 if live.startswith(wide) else stream.dtype


def _block_paths(artifact: Artifact) -> list[str]:
    """Live names of all blocks of all components that the checkpoint stores."""
    family, config = artifact.family, artifact.source_config()
    blocks = [c.block(i) for c in family.components for i in range(c.stored(config))]
    return [family.live_name(f"{block}.weight").removesuffix(".weight") for block in blocks]


def _owners(model: nn.Module, blocks: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Modules that are loaded when they are called, with the live names of their parameters.

    These are whole blocks, `nn.MultiheadAttention` (it reads its children's parameters itself), and every other module
    that has parameters.
    """
    whole = set(blocks)
    inside: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if path.rpartition(".")[0] in inside:
            inside.add(path)
            continue
        together = path in whole or isinstance(module, nn.MultiheadAttention)
        if together:
            inside.add(path)
        names = [name for name, _ in module.named_parameters(path, recurse=together, remove_duplicate=False)]
        if names:
            yield path, names
