"""llm-compressor's GPTQ on the language model of a LLaVA or BLIP-2; started by `bench/quantize.py` with another Python.

    python -m bench.quantize_peer MODEL INPUTS.safetensors OUT.safetensors --group 128 --observer NAME --device cuda

INPUTS contains batches as `NUMBER.name`. Samples are passed one by one without padding, which llm-compressor would
include in its statistics. llm-compressor 0.14 cannot trace BLIP-2's vision part, so for BLIP-2 it gets the language
model and the language model's inputs. OUT gets the dequantized weight of every quantized linear, by its name in the
live model. The last line of the output is JSON.
"""

import argparse
import json
import time
from typing import Any

from bench.memory import Watch


def samples(file: str) -> list[dict[str, Any]]:
    """Batches of one sample without padding."""
    from safetensors.torch import load_file

    batches: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(file).items():
        number, _, name = key.partition(".")
        batches.setdefault(int(number), {})[name] = tensor
    rows = []
    for _, batch in sorted(batches.items()):
        for i, mask in enumerate(batch["attention_mask"]):
            length = int(mask.sum())
            row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            rows.append({name: t[:, :length] if t.shape[1:] == mask.shape else t for name, t in row.items()})
    return rows


def language_inputs(model: Any, sample_rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Inputs of BLIP-2's language model: `inputs_embeds` `[1, tokens, width]` and `attention_mask`."""
    import torch

    received: list[dict[str, Any]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        received.append({name: kwargs[name].cpu() for name in ("inputs_embeds", "attention_mask")})

    handle = model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    model.to(device)
    with torch.inference_mode():
        for row in sample_rows:
            model(**{name: t.to(device, model.dtype if t.is_floating_point() else None) for name, t in row.items()})
    model.to("cpu")
    handle.remove()
    return [{name: tensor.clone() for name, tensor in row.items()} for row in received]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("inputs")
    parser.add_argument("out")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--observer", default="memoryless_minmax")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(
        options.model, dtype="auto", trust_remote_code=False
    )  # scales get its dtype, as in mmq
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": options.group}
    weights |= {"observer": options.observer, "actorder": "static"}
    text = "language_model.*" if model.config.model_type == "llava" else ""
    targets = [f"re:.*{text}layers.*(proj|fc1|fc2)$"]
    recipe = GPTQModifier(
        config_groups={"language": {"targets": targets, "weights": weights}}, dampening_frac=0.01, block_size=128
    )
    data: Any = samples(options.inputs)
    part, prefix = model, ""
    if model.config.model_type == "blip-2":
        data, part, prefix = language_inputs(model, data, options.device), model.language_model, "language_model."
        part.config.name_or_path = options.model  # llm-compressor reads its config.json again
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Watch() as host:
        start = time.perf_counter()
        oneshot(
            model=part,
            processor=AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
            dataset=torch.utils.data.DataLoader(data, batch_size=None),
            recipe=recipe,
            num_calibration_samples=len(data),
            sequential_targets=["LlamaDecoderLayer", "OPTDecoderLayer"],
        )
        seconds = time.perf_counter() - start
    device = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    quantized = {name: module for name, module in part.named_modules() if hasattr(module, "weight_scale")}
    save_file(
        {prefix + name: module.weight.detach().cpu().contiguous() for name, module in quantized.items()}, options.out
    )
    gib = 2**30
    print(json.dumps({"seconds": seconds, "device_gib": device / gib, "host_gib": host.peak / gib}))


if __name__ == "__main__":
    main()
