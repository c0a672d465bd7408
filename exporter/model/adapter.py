"""LoRA adapters in peft's format, merged into the base model's tensors when these are read.

`adapter_config.json` has the settings; `adapter_model.safetensors` has two low-rank matrices A and B for every trained
linear. Its weight becomes W + scale * B A, computed in float32 like peft's `merge_and_unload`. Tensors that were
trained in full (`modules_to_save`) replace the base model's; beside LoRA of the output head, peft also stores the
head's own weight (`base_layer`). Settings that mmq cannot merge exactly are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exporter.errors import CheckpointError, one_line
from exporter.files.safetensors_header import Entry, read_header
from exporter.files.strict_json import kind, read_json
from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN_STARTS = (True, False, None, "gaussian", "eva")  # initializations that leave the base weights unchanged
UNSUPPORTED = (  # settings that change the arithmetic
    *("alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias"),
    *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
    "velora_config",
)
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
_SAVED = re.compile(r"\.(modules_to_save|original_module)(\.default)?(?=\.)")
_BASE = ".base_layer.weight"  # the weight to which the product is added


@dataclass(frozen=True)
class Pair:
    """The two tensor names of one linear's LoRA, and the factor of their product."""

    a: str
    b: str
    scale: float


class Adapter:
    """An adapter. pairs: checkpoint name of a weight -> its LoRA. whole: checkpoint name -> tensor name in the file."""

    def __init__(self, folder: Path, pairs: Mapping[str, Pair], whole: Mapping[str, str]) -> None:
        self.folder = folder
        self.pairs = dict(pairs)
        self.whole = dict(whole)
        self._file: Any = None

    @property
    def files(self) -> list[Path]:
        """The files that determine the adapter's content."""
        return [self.folder / SETTINGS, self.folder / WEIGHTS]

    @property
    def name(self) -> str:
        """The name of the adapter's folder."""
        return one_line(self.folder.resolve().name)

    def note(self) -> str:
        """A sentence about the adapter for plans."""
        whole = f", {len(self.whole)} tensors replaced" if self.whole else ""
        return f"adapter {self.name}: merged into {len(self.pairs)} linears{whole}"

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The base model's tensor with the adapter merged, in the same dtype; unchanged without a part in it."""
        if name in self.whole:
            tensor = self._read(self.whole[name]).to(tensor.dtype)
        pair = self.pairs.get(name)
        if pair is None:
            return tensor
        product = self._read(pair.b).float() @ self._read(pair.a).float()
        return (tensor.float() + pair.scale * product).to(tensor.dtype)

    def _read(self, stored: str) -> Tensor:
        try:
            if self._file is None:
                self._file = safe_open(self.folder / WEIGHTS, framework="pt", device="cpu")
            tensor: Tensor = self._file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / WEIGHTS}: cannot read {stored} ({error})") from None
        if not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{self.folder / WEIGHTS}: {stored} has values that are not finite")
        return tensor


def open_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]) -> Adapter:
    """The adapter in `folder` for a base model with these tensor shapes, by checkpoint name.

    rename: name in transformers -> checkpoint name. CheckpointError lists everything that cannot be merged.
    """
    if not (folder / SETTINGS).exists():
        raise CheckpointError(f"{folder}: no {SETTINGS}", "--adapter needs a folder written by peft's save_pretrained")
    if not (folder / WEIGHTS).exists():
        others = sorted(path.name for path in folder.glob("adapter_model.*"))
        hint = f"mmq reads only safetensors files, not pickles ({others[0]})" if others else None
        raise CheckpointError(f"{folder}: no {WEIGHTS}", hint)
    settings = read_json(folder / SETTINGS)
    problems = _setting_problems(settings)
    entries = read_header(folder / WEIGHTS)
    pairs, whole = _sort(entries, settings, rename, problems) if not problems else ({}, {})
    problems += _shape_problems(entries, pairs, whole, shapes)
    if not problems and not (pairs or whole):
        problems = ["it has no tensors"]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems[:9])
        raise CheckpointError(
            f"{folder}: the adapter cannot be merged:{lines}", "merge it with peft, and export the merged model"
        )
    return Adapter(folder, pairs, whole)


def _setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """Settings of adapter_config.json that mmq cannot merge, as problems."""
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type: expected LORA, got {kind(settings.get('peft_type'))}")
    problems += [f"{key}: {kind(settings[key])} is not supported" for key in UNSUPPORTED if settings.get(key)]
    if settings.get("bias", "none") != "none":
        problems.append(f"bias: only none is supported, got {kind(settings['bias'])}")
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        problems.append(f"init_lora_weights: {kind(start)} changes the base model's weights, which is not supported")
    if not _positive(settings.get("lora_alpha")):
        problems.append(f"lora_alpha: expected a positive number, got {kind(settings.get('lora_alpha'))}")
    alphas = settings.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(_positive(value) for value in alphas.values()):
        problems.append("alpha_pattern: expected an object of positive numbers")
    elif not _is_plain(alphas):
        problems.append(f"alpha_pattern: {next(p for p in alphas if not _is_plain([p]))!r} is not a module name")
    if not isinstance(settings.get("use_rslora", False), bool):
        problems.append("use_rslora: expected true or false")
    return problems


def _is_plain(patterns: Any) -> bool:
    """Whether patterns are module names and no regular expressions."""
    return isinstance(patterns, dict | list) and all(re.fullmatch(r"[\w.]+", pattern) for pattern in patterns)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _sort(
    entries: Mapping[str, Entry], settings: Mapping[str, Any], rename: Callable[[str], str], problems: list[str]
) -> tuple[dict[str, Pair], dict[str, str]]:
    """LoRA pairs and fully trained tensors by checkpoint name; appends a problem for every other tensor."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored in entries:
        name = stored.removeprefix(PREFIX)
        match = _NAME.fullmatch(name)
        if match:
            earlier = halves.setdefault(match["module"], {}).setdefault(match["part"], stored)
        elif "lora_" in name:
            problems.append(f"{stored}: mmq merges only LoRA matrices of linears")
            continue
        else:
            plain = name.removesuffix(_BASE) + ".weight" if name.endswith(_BASE) else _SAVED.sub("", name)
            earlier = whole.setdefault(rename(plain), stored)
        if earlier != stored:
            problems.append(f"{stored}: the adapter has this tensor twice, the other one is {earlier}")
    pairs: dict[str, Pair] = {}
    for module, parts in halves.items():
        weight = rename(f"{module}.weight")
        if len(parts) < 2:
            problems.append(f"{next(iter(parts.values()))}: the other matrix of the pair is missing")
            continue
        if not whole.get(weight, _BASE).endswith(_BASE) or weight in pairs:
            problems.append(f"{parts['A']}: the adapter has {weight} twice")
        rank, expected = _rank(entries[parts["A"]]), _of_module(settings, "rank_pattern", "r", module)
        if _is_plain(settings.get("rank_pattern") or {}) and expected not in (None, rank):
            problems.append(f"{parts['A']}: its rank is {rank}, but {SETTINGS} has {kind(expected)}")
        pairs[weight] = Pair(parts["A"], parts["B"], _scale(settings, module, rank))
    return pairs, whole


def _rank(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 0


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""
    alpha = _of_module(settings, "alpha_pattern", "lora_alpha", module)
    root = max(rank, 1) ** 0.5 if settings.get("use_rslora") else max(rank, 1)
    return float(alpha / root)


def _of_module(settings: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """A setting of one module: that of the first pattern that its name ends with, else the general one."""
    named = settings.get(patterns) or {}
    named = named if isinstance(named, dict) else {}
    matching = [value for pattern, value in named.items() if f".{module}".endswith(f".{pattern}")]
    return matching[0] if matching else settings.get(default)


def _shape_problems(
    entries: Mapping[str, Entry],
    pairs: Mapping[str, Pair],
    whole: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Tensors of the adapter that are not in the base model, or do not match its shapes, as problems."""
    problems = []
    for name, pair in pairs.items():
        a, b, base = entries[pair.a].shape, entries[pair.b].shape, shapes.get(name)
        if base is None:
            problems.append(f"{pair.a}: the base model has no linear {name.removesuffix('.weight')}")
        elif len(base) != 2:
            problems.append(
                f"{pair.a}: mmq merges only LoRA matrices of linears, and {name} has the shape {list(base)}"
            )
        elif not (len(a) == len(b) == 2 and a[0] == b[1] > 0 and (b[0], a[1]) == base):
            problems.append(f"{pair.a} {list(a)} and {pair.b} {list(b)} do not multiply to {list(base)}")
    for name, stored in whole.items():
        if name not in shapes:
            problems.append(f"{stored}: the base model has no tensor {name}")
        elif entries[stored].shape != shapes[name]:
            problems.append(f"{stored}: its shape is {list(entries[stored].shape)}, expected {list(shapes[name])}")
    used = [stored for pair in pairs.values() for stored in (pair.a, pair.b)] + list(whole.values())
    types = {stored: entries[stored].dtype for stored in used}
    wrong = [stored for stored, dtype in types.items() if not dtype.is_floating_point or dtype.itemsize == 1]
    return problems + [f"{stored}: stored as {types[stored]}, expected 16-bit or 32-bit floats" for stored in wrong]
