"""Checkpoint folders of the two BLIP-2 demo models: config, tokenizer, processor, weights under hub names.

`demo-blip2` is a Blip2ForConditionalGeneration as `Salesforce/blip2-opt-2.7b` is (ViT with a fused qkv, Q-Former with
cross-attention in every second block, OPT); `demo-blip2-itm` a Blip2ForImageTextRetrieval as
`Salesforce/blip2-itm-vit-g-coco` is (no language model; text runs through the Q-Former).
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.data.demo.scenes import SIDE
from tools.demo_training.folder import (
    BOS,
    EOS,
    HIDDEN,
    IMAGE,
    MEAN,
    PAD,
    PATCH,
    STD,
    VISION_MLP,
    VOCABULARY,
    hub_tensors,
    write_generation,
    write_json,
    write_tokenizer,
)

Kind = Literal["captioning", "retrieval"]
QUERIES = 32
LONGEST = 126  # text positions; 128 rows with OPT's offset of 2
OPT_OFFSET = 2
TEXT_MLP = 512
FORMER_MLP: dict[str, int] = {"captioning": 256, "retrieval": 384}  # as large as 3 MB allow
MORE_WORDS = ("short",)  # in the question prompt
GRID = SIDE // PATCH
SLOWEST, FASTEST = 0.2, 1.5  # radians a patch, of the sinusoids that initialize positions


def _vision(blocks: int, heads: int) -> dict[str, Any]:
    vision = {"model_type": "blip_2_vision_model", "hidden_size": HIDDEN, "intermediate_size": VISION_MLP}
    vision |= {"num_hidden_layers": blocks, "num_attention_heads": heads, "image_size": SIDE, "patch_size": PATCH}
    return vision | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "initializer_range": 0.02}


def _former(kind: Kind, blocks: int, heads: int) -> dict[str, Any]:
    former = {"model_type": "blip_2_qformer", "hidden_size": HIDDEN, "encoder_hidden_size": HIDDEN}
    former |= {"intermediate_size": FORMER_MLP[kind], "num_hidden_layers": blocks, "num_attention_heads": heads}
    former |= {"cross_attention_frequency": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    former |= {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST + OPT_OFFSET, "pad_token_id": PAD}
    return former | {"use_qformer_text_input": kind == "retrieval"}


def _opt(blocks: int, heads: int) -> dict[str, Any]:
    text = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": HIDDEN, "ffn_dim": TEXT_MLP}
    text |= {"num_hidden_layers": blocks, "num_attention_heads": heads, "word_embed_proj_dim": HIDDEN}
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "do_layer_norm_before": True}
    text |= {"activation_function": "relu", "dropout": 0.0, "attention_dropout": 0.0}
    return text | {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def config(kind: Kind, vision_blocks: int = 2, former_blocks: int = 3, text_blocks: int = 2) -> dict[str, Any]:
    """config.json of a BLIP-2 demo model with blocks of width 128."""
    shared = {"model_type": "blip-2", "dtype": "bfloat16", "num_query_tokens": QUERIES}
    shared |= {"vision_config": _vision(vision_blocks, 2), "qformer_config": _former(kind, former_blocks, 4)}
    if kind == "retrieval":
        shared |= {"image_text_hidden_size": HIDDEN, "image_token_index": None}
        return {"architectures": ["Blip2ForImageTextRetrieval"], **shared}
    shared |= {"image_token_index": IMAGE, "use_decoder_only_language_model": True}
    return {"architectures": ["Blip2ForConditionalGeneration"], **shared, "text_config": _opt(text_blocks, 2)}


def sinusoids(positions: Tensor) -> Tensor:
    """Positions float `[n, 2]`, in patches, as sines and cosines of 32 frequencies an axis: float `[n, 128]`."""
    count = HIDDEN // 4
    rates = SLOWEST * (FASTEST / SLOWEST) ** (torch.arange(count) / (count - 1))
    angles = (positions[:, :, None] * rates).flatten(1)  # [n, 64]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _spread_positions(count: int) -> Tensor:
    """`count` positions float `[count, 2]`, evenly spread over the picture, in patches (Roberts' R2 sequence)."""
    steps = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)
    return ((0.5 + torch.arange(count, dtype=torch.float64)[:, None] * steps) % 1 * GRID - 0.5).float()


@torch.no_grad()
def _initialize(model: Any) -> None:
    """Initialize the weights for training.

    transformers' initialization gives vision weights near zero (1e-10) and equal queries (zero). Here positions are
    sinusoids and the first cross-attention compares them, so each query initially attends
    to a different part of the picture.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    embeddings = model.vision_model.embeddings
    cells = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).float()
    embeddings.position_embedding.copy_(torch.cat([torch.zeros(1, HIDDEN), 0.5 * sinusoids(cells)])[None])
    nn.init.normal_(embeddings.class_embedding, std=0.5)
    nn.init.normal_(embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * 3 * PATCH * PATCH))
    nn.init.zeros_(embeddings.patch_embedding.bias)
    model.query_tokens.copy_(sinusoids(_spread_positions(QUERIES))[None] + 0.1 * torch.randn(1, QUERIES, HIDDEN))
    crossing = [block.crossattention for block in model.qformer.encoder.layer if block.has_cross_attention]
    for part in crossing:
        nn.init.orthogonal_(part.attention.value.weight)
        nn.init.orthogonal_(part.output.dense.weight)
    nn.init.orthogonal_(crossing[0].attention.query.weight, gain=1.25)
    crossing[0].attention.key.weight.copy_(crossing[0].attention.query.weight)


def build(settings: dict[str, Any], seed: int) -> Any:
    """A new float32 model of the architecture in `settings`."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, settings["architectures"][0])(transformers.Blip2Config.from_dict(settings)).float()
    _initialize(model)
    return model


def _stored(model: Any) -> dict[str, Tensor]:
    """Tensors as the hub stores them: OPT's output matrix is its embedding and is not stored twice."""
    tensors = hub_tensors(model, lambda name: name)
    return {name: tensor for name, tensor in tensors.items() if name != "language_model.lm_head.weight"}


def save(model: Any, settings: dict[str, Any], out: Path) -> None:
    """Write the complete folder that transformers (and, for captioning, vLLM) loads."""
    out.mkdir(parents=True, exist_ok=True)
    generates = "text_config" in settings
    save_file(_stored(model), out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", settings)
    if generates:
        write_generation(out)
    # Retrieval uses the output of the first token, so texts are padded on the right.
    write_tokenizer(out, "Blip2Processor", LONGEST - QUERIES, "left" if generates else "right", MORE_WORDS)
    pictures = {"do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_rescale": True}
    pictures |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}
    pictures |= {"do_convert_rgb": True, "image_processor_type": "BlipImageProcessor"}
    write_json(out / "preprocessor_config.json", {**pictures, "processor_class": "Blip2Processor"})
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": QUERIES if generates else None}
    write_json(out / "processor_config.json", processor)
