"""Rotations of a ViT, folded into its weights: do fewer bits or 8-bit inputs cost less in the rotated model?

    python -m bench.rotations --draws 3 --json docs/measurements/rotations.json

R1 rotates the residual stream of demo-blip2's ViT, R2 the values of each attention head (QuaRot, SpinQuant). R1 fixes
the vector of ones, so it commutes with a LayerNorm without weights; these are first folded into the next linears
("folded"), those of the last LayerNorm into the Q-Former's keys and values. The rotated model computes the same in full
precision and needs nothing at run time. CLIP has no R1: the weights of its first LayerNorm act on the residual stream.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers import Judge, own_weights, recipe_of
from bench.quantize_phase import inputs_of
from exporter.device import choose
from exporter.model.embedded import MODELS
from exporter.numerics.activation_rounding import round_rows

MODEL = "demo-blip2"
VIT = "vision_model"
KINDS = {"plain": (False, False, False), "folded": (True, False, False), "R1": (True, True, False)}
KINDS |= {"R2": (False, False, True), "R1 and R2": (True, True, True)}  # folded, R1, R2
RULES: dict[str, dict[str, Any]] = {
    "W4 g32, `rtn`": {"method": "rtn", "bits": 4, "group_size": 32},
    "W4 g32, `gptq`": {"method": "gptq", "bits": 4, "group_size": 32},
    "W3 g32, `gptq`": {"method": "gptq", "bits": 3, "group_size": 32},
    "W4 row, `rtn`": {"method": "rtn", "bits": 4, "group_size": "row"},
    "W4 row, `gptq`": {"method": "gptq", "bits": 4, "group_size": "row"},
    "W3 row, `gptq`": {"method": "gptq", "bits": 3, "group_size": "row"},
    "W8A8, `rtn`": {"method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"},
}


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, f64 `[size, size]`."""
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    return basis


def fixing_ones(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix that maps the vector of ones to itself, f64 `[size, size]`."""
    start = torch.randn(size, size, dtype=torch.float64, generator=generator)
    start[:, 0] = 1
    basis: Tensor = torch.linalg.qr(start)[0]
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(size - 1, generator))
    turn: Tensor = basis @ inner @ basis.T
    return turn


def fold(tensors: dict[str, Tensor], norm: str, linears: list[str]) -> None:
    """Move the weights of a LayerNorm into the linears that read it."""
    scale, shift = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
    for name in linears:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + weight @ shift
        tensors[f"{name}.weight"] = weight * scale
    tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = torch.ones_like(scale), torch.zeros_like(shift)


def rotated(tensors: dict[str, Tensor], heads: int, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a BLIP-2, f64, with its ViT rotated."""
    folded, residual, values = KINDS[kind]
    generator, tensors = torch.Generator().manual_seed(seed), dict(tensors)
    blocks = sorted({".".join(name.split(".")[:4]) for name in tensors if name.startswith(f"{VIT}.encoder.layers")})
    readers = [name.removesuffix(".weight") for name in tensors if name.startswith("qformer.")]
    readers = [
        name for name in readers if name.endswith(("crossattention.attention.key", "crossattention.attention.value"))
    ]
    inputs = {f"{VIT}.post_layernorm": readers}
    for block in blocks:
        inputs |= {f"{block}.layer_norm1": [f"{block}.self_attn.qkv"], f"{block}.layer_norm2": [f"{block}.mlp.fc1"]}
    if folded:
        for norm, linears in inputs.items():
            fold(tensors, norm, linears)
    width = tensors[f"{VIT}.post_layernorm.weight"].numel()
    if residual:
        turn = fixing_ones(width, generator)
        for linear in (linear for linears in inputs.values() for linear in linears):
            tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] @ turn.T
        for name in (f"{block}.{end}" for block in blocks for end in ("self_attn.projection", "mlp.fc2")):
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
                turn @ tensors[f"{name}.weight"],
                turn @ tensors[f"{name}.bias"],
            )
        for end in ("class_embedding", "position_embedding", "patch_embedding.bias"):
            tensors[f"{VIT}.embeddings.{end}"] = tensors[f"{VIT}.embeddings.{end}"] @ turn.T
        patches = tensors[f"{VIT}.embeddings.patch_embedding.weight"]
        tensors[f"{VIT}.embeddings.patch_embedding.weight"] = (turn @ patches.flatten(1)).view_as(patches)
    if values:
        for block in blocks:
            turn = torch.block_diag(*(orthogonal(width // heads, generator) for _ in range(heads)))
            for end in ("weight", "bias"):
                whole = tensors[f"{block}.self_attn.qkv.{end}"].clone()
                whole[2 * width :] = turn @ whole[2 * width :]
                tensors[f"{block}.self_attn.qkv.{end}"] = whole
            projection = f"{block}.self_attn.projection.weight"
            tensors[projection] = tensors[projection] @ turn.T
    return tensors


def write_rotated(out: Path, kind: str) -> None:
    """Write demo-blip2 with its ViT rotated, weights in float32."""
    shutil.copytree(MODELS[MODEL], out)
    config = json.loads((out / "config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(out / "model.safetensors").items()}
    turned = rotated(tensors, config["vision_config"]["num_attention_heads"], kind)
    save_file(
        {name: tensor.float().contiguous() for name, tensor in turned.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )


@contextmanager
def rounded_inputs(model: torch.nn.Module, names: list[str]) -> Iterator[None]:
    """Round the inputs of these linears to int8 with one scale per token."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args: (round_rows(args[0], "int8"), *args[1:])
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(options: argparse.Namespace, rules: list[str]) -> Iterator[dict[str, Any]]:
    """A row of figures for every rotation, rule and draw."""
    device = choose(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.kinds:
            options.model = str(Path(scratch) / kind.replace(" ", "-"))
            write_rotated(Path(options.model), kind)
            judge = Judge(recipe_of(options, {"method": "rtn", "bits": 8}, 0, "family"), options.test_samples, device)
            judge.stored = torch.float32  # the rotated weights in bfloat16 would add a rounding of their own
            for draw in range(options.draws):
                _, inputs = inputs_of(recipe_of(options, {"method": "gptq", "bits": 4}, draw, "family"), device)
                for name in rules:
                    if draw and RULES[name]["method"] == "rtn":
                        continue
                    weights, _ = own_weights(recipe_of(options, RULES[name], draw, "family"), inputs, device)
                    linears = [w.removesuffix(".weight") for w in weights] if "activations" in RULES[name] else []
                    with rounded_inputs(judge.model, linears):
                        figures = judge(weights)
                    yield {"rotation": kind, "rule": name, "draw": draw, **figures}


def table(rows: list[dict[str, Any]]) -> str:
    """A line per rule, a column per rotation: means over the draws of KL."""
    kinds, rules = (list(dict.fromkeys(row[key] for row in rows)) for key in ("rotation", "rule"))
    lines = [f"| scheme | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for rule in rules:
        cells = [
            f"{mean(row['kl'] for row in rows if (row['rule'], row['rotation']) == (rule, kind)):.2g}" for kind in kinds
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration samples")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--test-samples", type=int, default=300, help="test samples of each task")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.component, options.data = "vision", "demo"
    rows = []
    for row in measure(options, options.rules):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
