"""The language model of a LLaVA or BLIP-2 as a text model with calibration inputs, for tools that accept only text.

Such tools pass token ids. The written model therefore has one embedding for every input vector that the language model
receives, words and picture features alike, so that each tool calibrates on exactly the inputs that mmq uses.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.device import Device
from exporter.model.stream import load_whole
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe import Recipe

SIZED_BY_WORDS = re.compile(r"embed_tokens|lm_head")


def language_part(model: Any) -> Any:
    """The part of a LLaVA or BLIP-2 in transformers that receives `inputs_embeds`."""
    return model.language_model if hasattr(model, "language_model") else model.model.language_model


@torch.inference_mode()
def write_language_model(recipe: Recipe, inputs: Sequence[dict[str, Tensor]], folder: Path, device: Device) -> Path:
    """Write the language model to `folder`, and its calibration inputs to `inputs.safetensors` in it.

    inputs: calibration batches. The file has one tensor of token ids `[tokens]` per sample, without padding.
    `names.json` maps the text model's tensors in its blocks to those of the whole model. Returns `folder`.
    """
    plan, checkpoint = prepare(recipe, device)
    model = load_whole(
        plan.family, checkpoint.config, checkpoint.tensors, checkpoint.read, device.torch_device, torch.float32
    )
    rows = _input_vectors(model, inputs, device)
    text, names = _text_model(model, torch.cat(rows))
    text.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):  # llm-compressor requires a tokenizer, and does not use it
        shutil.copy(checkpoint.folder / file, folder)
    (folder / "names.json").write_text(json.dumps(names))
    ids = torch.arange(sum(map(len, rows))).split([len(row) for row in rows])
    save_file({f"{i:05d}": row.clone() for i, row in enumerate(ids)}, folder / "inputs.safetensors")
    return folder


def _input_vectors(model: Any, inputs: Sequence[dict[str, Tensor]], device: Device) -> list[Tensor]:
    """The input vectors of the language model for every sample, f32 `[tokens, width]`, without padding."""
    rows: list[Tensor] = []
    for batch in inputs:
        received: list[Tensor] = []

        def record(module: Any, args: Any, kwargs: dict[str, Any], received: list[Tensor] = received) -> None:
            received.append(kwargs["inputs_embeds"].float().cpu())

        handle = language_part(model).register_forward_pre_hook(record, with_kwargs=True)
        model(**{name: tensor.to(device.torch_device) for name, tensor in batch.items()}, use_cache=False)
        handle.remove()
        lengths = batch["attention_mask"].sum(1) + received[0].shape[1] - batch["attention_mask"].shape[1]
        rows += [hidden[: int(length)] for hidden, length in zip(received[0], lengths, strict=True)]
    return rows


def _text_model(model: Any, embeddings: Tensor) -> tuple[Any, dict[str, str]]:
    """A causal language model with the weights of `model`'s, and `embeddings` f32 `[tokens, width]`.

    Also returns the names of its blocks' tensors -> their names in the whole model.
    """
    from transformers import AutoModelForCausalLM

    config = model.config.text_config
    config.vocab_size, config.tie_word_embeddings = len(embeddings), False
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    text = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    part = language_part(model)
    tensors = part.state_dict()
    inner = "" if any(name.startswith("model.") for name in tensors) else "model."
    outer = next(name for name, module in model.named_modules() if module is part)
    kept = {name: tensor.cpu() for name, tensor in tensors.items() if not SIZED_BY_WORDS.search(name)}
    text.load_state_dict({inner + name: tensor for name, tensor in kept.items()}, strict=False)
    text.get_input_embeddings().weight.copy_(embeddings)
    text.get_output_embeddings().weight.zero_()
    return text, {inner + name: f"{outer}.{name}" for name in kept if "layers" in name}
