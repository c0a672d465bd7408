"""Compare an artifact's blocks with compressed-tensors' reading of them, one block in memory at a time.

transformers builds the model for the artifact's config.json twice on the meta device: plain, and prepared by its own
quantizer as for loading the artifact. The plain model's own forward pass then runs on one picture and question. Before
a block runs, it receives the weights that mmq dequantizes; afterwards the block of the second model receives the stored
tensors, compressed-tensors decompresses them, and it runs on the same arguments.
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
from exporter.errors import ArtifactError
from exporter.events import Event, Listener
from exporter.inference.forward_hooks import first_output
from exporter.model.stream import Stream, build_skeleton

TOLERANCE = 1e-3  # of the largest output: sums of equal weights in another order; the weights are compared exactly


@dataclass(frozen=True)
class Blocks:
    """What the comparison saw. blocks: how many ran. difference: the largest of any block's outputs, in parts of its
    largest output; 0 where both are bit for bit the same.
    """

    blocks: int
    difference: float


def compare_blocks(artifact: Artifact, inputs: Mapping[str, Tensor], device: Device, on_event: Listener) -> Blocks:
    """Run the model once, streamed, and compare each block with compressed-tensors' reading of it.

    inputs: one batch as the processor makes it, on the CPU. Raises ArtifactError naming every linear whose decompressed
    weight is not the dequantized one, every block whose outputs differ, and every name that one side lacks.
    """
    family, config = artifact.family, artifact.source_config()
    stored = _stored_dtype(artifact.checkpoint.config)
    ours = Stream(family, config, device.torch_device, device.compute_dtype(stored))
    theirs = _Theirs(artifact, device, stored, ours.dtype)
    problems = theirs.name_problems()
    if problems:
        raise ArtifactError("\n".join(["transformers looks for other tensors than the artifact holds:", *problems]))
    walk = _Walk(artifact, ours, theirs, on_event)
    with torch.no_grad(), walk.hooked():
        family.outputs(ours.model, ours.inputs(inputs))
    if walk.problems:
        lines = "\n".join(f"  {problem}" for problem in walk.problems)
        raise ArtifactError(f"transformers reads other numbers than were computed:\n{lines}")
    return Blocks(walk.ran, walk.difference)


def _stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which transformers loads the model: what config.json says, else float32."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))  # type: ignore[no-any-return]


class _Theirs:
    """The model as transformers' quantizer prepares it; its blocks hold tensors only while they run."""

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
        """Tensors that only the artifact or only the prepared model has."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        expected = {name for name in parameters if not name.endswith(CACHE_SCALES)} - self._aliases.keys()
        held = {name for name in self._checkpoint_names if not name.endswith(CACHE_SCALES)} - self._aliases.keys()
        lacks = [f"  {name}: transformers expects it, the artifact lacks it" for name in sorted(expected - held)]
        packed = {self._artifact.family.live_name(name) for name in self._artifact.packed_names()}
        extra = [f"  {name}: transformers has no place for it" for name in sorted(packed - expected)]
        return lacks + extra

    @contextmanager
    def loaded(self, path: str) -> Iterator[tuple[nn.Module, list[str]]]:
        """The live block `path` with its stored tensors decompressed, and what is wrong with them."""
        block = self.model.get_submodule(path)
        before = [(module, dict(module._parameters)) for module in block.modules()]
        problems: list[str] = []
        for name, module in block.named_modules(prefix=path):
            self._fill(name, module, problems)
        try:
            yield block, problems
        finally:
            for module, parameters in before:
                module._parameters.clear()
                module._parameters.update(parameters)

    def _fill(self, path: str, module: nn.Module, problems: list[str]) -> None:
        wide = path.startswith(self._wide)
        scheme = getattr(module, "quantization_scheme", None)  # attention has one without weights: of its cache
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
            self._decompress(path, module, problems)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(torch.float32 if wide else self._compute)

    def _decompress(self, path: str, module: Any, problems: list[str]) -> None:
        from compressed_tensors.compressors import decompress_module
        from compressed_tensors.quantization import QuantizationStatus

        module.quantization_status = QuantizationStatus.COMPRESSED
        decompress_module(module)
        linear = self._artifact.linear(self._linears[f"{path}.weight"])
        if not torch.equal(module.weight, linear.dequantize(module.weight.dtype)):
            problems.append(f"{path}: compressed-tensors decompresses another weight than was computed")


def _prepare(model: Any, quantization_config: Mapping[str, Any]) -> None:
    """Give the linears of a plain model on the meta device the parameters of packed ones, as `from_pretrained` does."""
    from transformers.quantizers import AutoHfQuantizer

    with redirect_stderr(StringIO()), torch.device("meta"):  # the library draws progress bars
        quantizer = AutoHfQuantizer.from_config(dict(quantization_config), pre_quantized=True)
        quantizer.validate_environment()
        quantizer.preprocess_model(model=model)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            scheme.input_activations = None  # weights alone are compared: engines round inputs and caches


def _tied(model: Any) -> dict[str, str]:
    """Name of a parameter that shares another's tensor -> that other's name."""
    model.tie_weights()
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases


class _Walk:
    """Hooks that give each module of the plain model its tensors while it runs, and compare each block."""

    def __init__(self, artifact: Artifact, ours: Stream, theirs: _Theirs, on_event: Listener) -> None:
        self._artifact, self._ours, self._theirs, self._on_event = artifact, ours, theirs, on_event
        self._names = {artifact.family.live_name(name): name for name in artifact.names()}
        for alias, name in _tied(ours.model).items():
            if alias not in self._names and name in self._names:
                self._names[alias] = self._names[name]
        for live, _ in list(ours.model.named_parameters(remove_duplicate=False)):
            _set(ours, live, None)
        self._blocks = dict.fromkeys(_block_paths(artifact))
        self.problems: list[str] = []
        self.difference = 0.0
        self.ran = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While inside, modules receive their tensors as they are called."""
        handles = []
        for path, names in _owners(self._ours.model, self._blocks):
            module = self._ours.model.get_submodule(path)
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
                _set(self._ours, name, self._artifact_tensor(name))

        return load

    def _artifact_tensor(self, live: str) -> Tensor:
        if live not in self._names:
            raise ArtifactError(f"the artifact lacks {live}")
        name = self._names[live]
        module = name.removesuffix(".weight")
        wide = name.startswith(self._artifact.family.float32)
        stored = torch.float32 if wide else self._theirs._stored
        packed = module in self._artifact.manifest.linears
        tensor = self._artifact.linear(module).dequantize(stored) if packed else self._artifact.read(name)
        return tensor.to(self._ours.device, stored).to(torch.float32 if wide else self._ours.dtype)

    def _unloading(self, module: nn.Module, names: list[str]) -> Callable[..., None]:
        def unload(*_: Any) -> None:
            for name in names:
                _set(self._ours, name, None)

        return unload

    def _comparing(self, path: str, module: nn.Module, names: list[str]) -> Callable[..., None]:
        unload = self._unloading(module, names)

        def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            unload()
            with self._theirs.loaded(path) as (block, problems):
                self.problems += problems
                if not problems:
                    self._judge(path, first_output(output).float(), first_output(block(*args, **kwargs)).float())
            self.ran += 1
            self._on_event(Event("verify", min(self.ran, len(self._blocks)), len(self._blocks), path))

        return compare

    def _judge(self, path: str, ours: Tensor, theirs: Tensor) -> None:
        size = float(ours.abs().max())
        difference = float((ours - theirs).abs().max()) / max(size, 1e-30)
        self.difference = max(self.difference, difference)
        if not difference <= TOLERANCE:
            self.problems.append(f"{path}: its outputs differ by {difference:.1e} of the largest")


def _set(stream: Stream, live: str, tensor: Tensor | None) -> None:
    """Give the live parameter a tensor, or None: take it away and leave its shape."""
    path, _, attribute = live.rpartition(".")
    module = stream.model.get_submodule(path)
    parameter = getattr(module, attribute)
    if tensor is not None and tensor.shape != parameter.shape:
        raise ArtifactError(f"{live} is {list(tensor.shape)}, its config.json asks for {list(parameter.shape)}")
    if tensor is None:  # no memory, but the shape, dtype and device that forward passes ask of absent weights too
        tensor = torch.zeros(1, dtype=_dtype(stream, live), device=stream.device).expand(parameter.shape)
    module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _dtype(stream: Stream, live: str) -> torch.dtype:
    """The dtype in which a parameter is held while it is loaded."""
    wide = tuple(stream.family.live_name(name) for name in stream.family.float32)
    return torch.float32 if live.startswith(wide) else stream.dtype


def _block_paths(artifact: Artifact) -> list[str]:
    """Live names of all blocks of all components that the checkpoint stores."""
    family, config = artifact.family, artifact.source_config()
    blocks = [c.block(i) for c in family.components for i in range(c.stored(config))]
    return [family.live_name(f"{block}.weight").removesuffix(".weight") for block in blocks]


def _owners(model: nn.Module, blocks: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Modules that are loaded when they are called, with the live names of what they need.

    These are whole blocks, torch's attention (it reads its children's parameters itself), and every other module that
    has parameters of its own.
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
