"""AutoRound or llm-compressor on a text model with calibration inputs; `bench/peers.py` starts it with their Python.

    python -m bench.peers_tools autoround-200 FOLDER OUT.safetensors --bits 3 --group 32

FOLDER is what `bench/peers_inputs.py` writes. Runs: `autoround-STEPS`, `autoround2-STEPS` (its algorithm extension,
SignRound v2), `autoround16-STEPS` (bfloat16 as its users run it, to compare times), `llmcompressor-gptq`,
`llmcompressor-awq`. OUT gets the dequantized weight of every quantized linear, by
its name in the whole model. The last line of the output is JSON with the seconds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BATCH = 8
OPT = (  # a layer whose outputs AWQ scales -> the linears that divide by it
    ("self_attn_layer_norm", ("q_proj", "k_proj", "v_proj")),
    ("v_proj", ("out_proj",)),
    ("final_layer_norm", ("fc1",)),
    ("fc1", ("fc2",)),
)


def padded(rows: list[Tensor], pad: int) -> list[dict[str, Tensor]]:
    """Batches of token ids and attention masks, all rows padded on the right to one length.

    The last position of every row is padding, because AutoRound leaves it out of its loss.
    """
    length = 1 + max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    parts = ids.split(BATCH)
    return [{"input_ids": part, "attention_mask": (part != pad).long()} for part in parts]


def with_padding(model: Any) -> int:
    """Append a zero vector to the embeddings, for padding; returns its id."""
    words = model.get_input_embeddings()
    pad = int(words.weight.shape[0])
    words.weight = torch.nn.Parameter(torch.cat([words.weight, torch.zeros_like(words.weight[:1])]))
    words.num_embeddings = pad + 1
    words.padding_idx = None
    return pad


def autoround(model: Any, rows: list[Tensor], options: argparse.Namespace) -> None:
    """Quantize `model` in place with AutoRound's defaults, in float32 unless the run is `autoround16`."""
    from auto_round import AutoRound

    name, _, steps = options.tool.partition("-")
    if name == "autoround16":
        model.to(torch.bfloat16)
    pad = with_padding(model)
    batches = padded(rows, pad)
    extension = {"enable_alg_ext": True} if name == "autoround2" else {}
    tuner = AutoRound(
        model,
        tokenizer=SimpleNamespace(pad_token_id=pad, pad_token="<pad>", eos_token="</s>", save_pretrained=None),
        bits=options.bits,
        group_size=options.group,
        sym=True,
        iters=int(steps),
        nsamples=len(rows),
        seqlen=batches[0]["input_ids"].shape[1],
        batch_size=BATCH,
        dataset=batches,
        amp=name == "autoround16",
        device_map=options.device,
        enable_torch_compile=False,
        **extension,
    )
    tuner.quantize()


def llmcompressor(model: Any, rows: list[Tensor], options: argparse.Namespace) -> None:
    """Quantize `model` in place with llm-compressor, sample by sample without padding."""
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.utils import update_offload_parameter
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoTokenizer

    if options.device == "cpu":  # llm-compressor pins without a GPU too
        torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]
    weights = {"num_bits": options.bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": options.group, "observer": "memoryless_mse"}
    targets = ["re:.*layers.*(proj|fc1|fc2)$"]
    modifier: Callable[..., Any] = AWQModifier
    more: dict[str, Any] = {}
    if model.config.model_type == "opt":  # the modifier supports the names of Llama's blocks only
        more = {
            "mappings": [
                AWQMapping(f"re:.*layers.*{smooth}$", [f"re:.*layers.*{name}$" for name in into])
                for smooth, into in OPT
            ]
        }
    if options.tool == "llmcompressor-gptq":
        modifier, more = GPTQModifier, {"dampening_frac": 0.01, "block_size": 128}
        weights |= {"actorder": "static"}
    recipe = modifier(config_groups={"language": {"targets": targets, "weights": weights}}, **more)
    data: Any = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(options.folder, trust_remote_code=False),
        dataset=torch.utils.data.DataLoader(data, batch_size=None),
        recipe=recipe,
        num_calibration_samples=len(rows),
        sequential_targets=["LlamaDecoderLayer", "OPTDecoderLayer"],
    )
    for module in model.modules():  # AWQ leaves the rounding to compression
        if hasattr(module, "weight_scale"):
            settings = module.quantization_scheme.weights
            zero = getattr(module, "weight_zero_point", None)
            rounded = fake_quantize(module.weight.data, module.weight_scale, zero, settings)
            update_offload_parameter(module, "weight", rounded)  # on a GPU the module's own tensor may be a copy


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    rows = [tensor for _, tensor in sorted(load_file(options.folder / "inputs.safetensors").items())]
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (autoround if options.tool.startswith("autoround") else llmcompressor)(model, rows, options)
    seconds = time.perf_counter() - start
    names = json.loads((options.folder / "names.json").read_text())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    save_file({names[name]: tensor.detach().float().contiguous() for name, tensor in tensors.items()}, options.out)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
