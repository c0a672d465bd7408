"""Helper process that loads processors and configs of unknown origin.

Usage: `python -m exporter.model.processors.inspector_process [HIDDEN ...]`.

It reads one JSON request per line from stdin and writes one JSON reply per line to stdout; `inspector` sends
the requests. A tokenizer that aborts, a template that never ends or a file that exhausts memory ends only this process.
HIDDEN: packages that it must not import; without torch it starts three times as fast.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from exporter.model.processors.chat_template import MAX_CHARACTERS, PROBES, conversation
from exporter.model.processors.files import PATTERNS
from exporter.model.processors.library import load_library
from exporter.model.processors.tokenizer_check import DamagedFile, refuse_shared_ids, try_out

ROOM_BYTES = 2 * 2**30  # memory for requests, in addition to that of the libraries
LOAD_SECONDS, USE_SECONDS, RENDER_SECONDS, ENCODE_SECONDS, CONFIG_SECONDS = 60, 20, 2, 20, 10  # of processor time
MAX_TOKENS = 200_000
TALL = (300, 1000)  # width and height of the second picture of a batch, where shapes depend on the picture
TYPICAL = (640, 480)  # width and height of the picture whose tokens predict memory, where their number varies
LARGEST_SIDE = 2**13  # largest side in pixels to which pictures may be scaled; larger ones take seconds and memory


class _Failed(Exception):
    """A failed step: its name, and the library's error."""

    def __init__(self, step: str, error: BaseException) -> None:
        super().__init__(step)
        self.step = step
        self.error = error


@contextmanager
def _step(name: str, seconds: int) -> Iterator[None]:
    """Assign errors inside the context to step `name`, and limit its processor time to `seconds`.

    An exception interrupts Python code; a library that does not return is ended after twice the time.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)
    try:
        yield
    except BaseException as error:  # noqa: BLE001 (Rust panics are not an `Exception`)
        raise _Failed(name, error) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _too_slow(signum: int, frame: Any) -> None:
    raise TimeoutError("it exceeds the time limit")


@lru_cache(maxsize=1)
def _load(folder: str, state: str) -> Any:
    """The processor of a folder. state: changes with its files, so that a changed folder is loaded again."""
    return load_library(Path(folder))


def inspect(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load the processor of `folder` (in its `state`), try its tokenizer and render its template.

    fallback: a prompt for processors without a template; when given, also encode small pictures with prompts. rows:
    number of tokens for which the model has embeddings.
    """
    with _step("load", LOAD_SECONDS):
        refuse_shared_ids(Path(request["folder"]))
        processor = _load(request["folder"], request["state"])
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ValueError("the tokenizer or the image processor is missing")
    with _step("tokenizer", USE_SECONDS):
        beyond = try_out(processor.tokenizer, request.get("rows"))
    rendered = None
    if getattr(processor, "chat_template", None):
        with _step("template", RENDER_SECONDS):
            rendered = [_render(processor, text) for text in PROBES]
    fields = {name: _setting(processor, name) for name in request.get("fields", ())}
    reply: dict[str, Any] = {"rendered": rendered, "beyond": beyond}
    start = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    reply["start"] = [str(start[0]), int(start[1])] if None not in start[:2] and start[1] != start[2] else None
    reply["added"] = _added(processor.tokenizer)
    reply["fields"] = {name: value for name, value in fields.items() if _plain(value)}
    if "fallback" in request:
        try:
            with _step("encode", ENCODE_SECONDS):
                prompt = _render(processor, request["text"]) if rendered else request["fallback"]
                marker, nested = request.get("varying"), request.get("nested", False)
                reply |= _encode(processor, prompt, nested, marker is not None)
                if marker is not None:
                    reply["typical"] = _typical_tokens(processor, prompt, nested, marker)
        except _Failed as failed:
            reply["failure"] = _reason(failed.error)
    return reply


def _added(tokenizer: Any) -> str:
    """The tokens, as text, that the tokenizer puts before every text."""
    text = PROBES[1]
    bare, whole = (tokenizer(text, add_special_tokens=add)["input_ids"] for add in (False, True))
    count = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    return "".join(tokenizer.convert_ids_to_tokens(whole[:count]))


def _setting(processor: Any, name: str) -> Any:
    """An attribute of the processor, or of an object in it: `image_processor.size.height`. None when it has none."""
    value = processor
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def _plain(value: Any, depth: int = 2) -> bool:
    """Whether a value is null, a number or a text, or a list of such values, or of lists of them."""
    if isinstance(value, list | tuple):
        return depth > 0 and all(_plain(entry, depth - 1) for entry in value)
    return value is None or isinstance(value, str | int | float | bool)


def _render(processor: Any, text: str) -> str:
    prompt = processor.apply_chat_template(conversation(text), add_generation_prompt=True)
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"it writes more than {MAX_CHARACTERS:,} characters")
    return prompt


def _encode(processor: Any, prompt: str, nested: bool, varying: bool) -> dict[str, Any]:
    """Token ids of one small picture with a prompt, and the shape of its pixels.

    nested: whether the processor takes a list of pictures for every text. varying: whether shapes depend on the
    picture, so that a batch has pictures of two sizes. padded: token ids of prompts and replies of two lengths, padded
    on both sides as in `encoding`. Raises what the processor raises, and ValueError for settings outside the limits.
    """
    import numpy as np
    from PIL import Image

    _refuse_sizes(processor.image_processor)
    gray, tall = (Image.new("RGB", size, "gray") for size in ((48, 36), TALL))
    pictures = [[gray], [tall if varying else gray]] if nested else [gray, tall if varying else gray]
    inputs = processor(images=pictures[:1], text=[prompt], return_tensors="np")
    ids = np.asarray(inputs["input_ids"]).reshape(-1)
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"it makes more than {MAX_TOKENS:,} tokens from one picture and a short prompt")
    pixels = np.asarray(inputs["pixel_values"])
    if not np.isfinite(pixels).all():
        raise ValueError("its pixel values are not finite: check image_mean, image_std and rescale_factor")
    texts, padded = [prompt, f"{prompt} {PROBES[1]}{processor.tokenizer.eos_token or ''}"], []
    for side in ("left", "right"):
        inputs = processor(images=pictures, text=texts, padding=True, padding_side=side, return_tensors="np")
        if np.asarray(inputs["pixel_values"]).dtype == object:
            raise ValueError("pictures of two sizes give pixels of two shapes, which no batch can hold: check do_pad")
        padded += np.asarray(inputs["input_ids"]).tolist()
    return {"tokens": ids.tolist(), "padded": padded, "pixels": list(pixels.shape)}


def _refuse_sizes(image_processor: Any) -> None:
    """ValueError when a side, or for Qwen's processors an area, to which pictures are scaled has no sense."""
    most = LARGEST_SIDE**2 if hasattr(image_processor, "merge_size") else LARGEST_SIDE
    for key, side in dict(getattr(image_processor, "size", None) or {}).items():
        if isinstance(side, int) and side > most:
            raise ValueError(f"size.{key} of its pictures: {side} exceeds the limit of {most}")
        if isinstance(side, int) and side < 1:
            raise ValueError(f"size.{key} of its pictures: {side} is below 1")


def _typical_tokens(processor: Any, prompt: str, nested: bool, marker: int) -> int:
    """Number of image tokens (id `marker`) of a picture of `TYPICAL` size."""
    from PIL import Image

    gray = Image.new("RGB", TYPICAL, "gray")
    inputs = processor(images=[[gray] if nested else gray], text=[prompt], return_tensors="np")
    return int((inputs["input_ids"] == marker).sum())


def read_config(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load a config.json with transformers' config class, which checks the type of every key but `model_type`.

    vLLM and transformers find the class of a model by it.
    """
    import transformers

    with _step("config", CONFIG_SECONDS):
        kind, named = getattr(transformers, request["config_class"]), request["config"].get("model_type")
        kind.from_dict(request["config"])
        if named != kind.model_type:
            raise ValueError(f"`model_type` must be {json.dumps(kind.model_type)}, got {json.dumps(named)[:60]}")
    return {}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one request: the result of `inspect` or `read_config`, or the failed step and the reason."""
    try:
        return read_config(request) if "config" in request else inspect(request)
    except _Failed as failed:
        file = _file(failed, request)
        reason = _reason(failed.error)
        return {"step": failed.step, "error": type(failed.error).__name__, "reason": reason, "file": file}


def _file(failed: _Failed, request: Mapping[str, Any]) -> str:
    """The file that probably caused the failure; empty when unknown."""
    if isinstance(failed.error, DamagedFile):
        return failed.error.file
    if failed.step == "tokenizer" and (Path(request["folder"]) / "tokenizer.json").exists():
        return "tokenizer.json"
    return blame(Path(request["folder"])) if failed.step == "load" else ""


def _reason(error: BaseException) -> str:
    """A library's error type and message, on one line."""
    if isinstance(error, MemoryError):
        return "it exceeds the memory limit for processors"
    message = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, DamagedFile):
        return message[:300]
    return f"{kind}: {message}"[:300] if message else kind


def blame(folder: Path) -> str:
    """The file because of which a processor cannot be loaded; empty when the libraries' errors do not show it."""
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern) if path.suffix == ".json"):
        try:
            if not isinstance(json.loads(path.read_text("utf-8")), dict):
                return path.name
        except (OSError, ValueError, RecursionError):
            return path.name
    try:
        from tokenizers import Tokenizer

        if (folder / "tokenizer.json").exists():
            Tokenizer.from_file(str(folder / "tokenizer.json"))
    except BaseException:  # noqa: BLE001 (Rust panics are not an `Exception`)
        return "tokenizer.json"
    return ""


def _limit_memory() -> None:
    """Limit the memory of this process to `ROOM_BYTES` more than it uses now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(hidden: list[str]) -> None:
    """Answer requests until stdin ends. The libraries get no stdin, and their output is discarded."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGPROF, _too_slow)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process when it ends
    sys.modules.update(cast(dict[str, ModuleType], dict.fromkeys(hidden)))  # None makes the import fail
    import transformers

    transformers.logging.set_verbosity_error()
    with suppress(ImportError, RuntimeError):  # a request will report the error again
        from transformers import AutoProcessor  # noqa: F401 (imported while the parent is still starting)
    _limit_memory()
    for line in requests:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
