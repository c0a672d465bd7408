"""The model of `bench/smollm2_llava.py`: SmolLM2 with a CLIP-style tower and low-rank adapters, and its scores."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.smollm2_rows import ASKED, IMAGE_TOKENS, Rows, conversations, pack
from exporter.data.demo.scenes import SIDE, draw, scene_objects, scenes
from tools.demo_training.folder import PATCH
from tools.demo_training.packing import normalize

VISION, VISION_MLP, VISION_BLOCKS, VISION_HEADS = 256, 1024, 4, 4
MULTIPLE = 64  # of the resized vocabulary


class LowRank(nn.Module):
    """A frozen linear plus a trained product of two narrow matrices, as in LoRA (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.enabled = base, True
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` through the linear, and through the trained matrices when `enabled`."""
        result: Tensor = self.base(x)
        return result + F.linear(F.linear(x, self.down), self.up) if self.enabled else result


def load_base(gguf: Path, blocks: int | None) -> tuple[Any, Any]:
    """SmolLM2 in float32 with its tokenizer, which gets `<image>`. blocks: keep only the first ones, for tests."""
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]})
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if blocks:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
    return model.requires_grad_(False), tokenizer


def config_of(base: Any, image: int) -> dict[str, Any]:
    """config.json of the LLaVA. image: the id of the image token."""
    vision: dict[str, Any] = {"model_type": "clip_vision_model", "hidden_size": VISION, "image_size": SIDE}
    vision |= {"intermediate_size": VISION_MLP, "num_hidden_layers": VISION_BLOCKS, "patch_size": PATCH}
    vision |= {"num_attention_heads": VISION_HEADS, "projection_dim": VISION, "hidden_act": "quick_gelu"}
    own = base.config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | {key: getattr(own, key) for key in keys}
    text |= {"head_dim": 64, "vocab_size": -(-(image + 1) // MULTIPLE) * MULTIPLE, "hidden_act": "silu"}
    text |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    theta = float(own.rope_parameters["rope_theta"])
    text |= {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "bfloat16",
        "image_token_index": image,
        "image_seq_length": IMAGE_TOKENS,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "text_config": text | ends,
        "vision_config": vision,
        **ends,
    }


@torch.no_grad()
def assemble(base: Any, settings: dict[str, Any], seed: int) -> Any:
    """The float32 LLaVA: new vision tower and projector, and the language model of `base` with a larger vocabulary."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(copy.deepcopy(settings))).float()
    words = base.get_input_embeddings().weight
    tensors = {name.removeprefix("model."): tensor for name, tensor in base.state_dict().items() if "layers" in name}
    tensors |= {"norm.weight": base.model.norm.weight}
    more = words.mean(0).expand(settings["text_config"]["vocab_size"] - len(words), -1)
    tensors |= {"embed_tokens.weight": torch.cat([words, more])}
    model.model.language_model.load_state_dict(tensors)
    model.tie_weights()
    return model


def add_adapters(model: Any, rank: int) -> dict[str, LowRank]:
    """Replace the linears of the language model's blocks by `LowRank`s; returns them by name."""
    language = model.model.language_model.requires_grad_(False)
    linears = {name: module for name, module in language.named_modules() if isinstance(module, nn.Linear)}
    adapters = {}
    for name, module in linears.items():
        parent, _, child = name.rpartition(".")
        adapters[name] = LowRank(module, rank)
        setattr(language.get_submodule(parent), child, adapters[name])
    model.lm_head.requires_grad_(False)
    return adapters


def patches_of(model: Any, pixels: Tensor) -> Tensor:
    """The tower's outputs without the class token, `[n, 64, width]`, of pixels uint8 `[n, 3, 64, 64]`."""
    result: Tensor = model.model.vision_tower(normalize(pixels)).last_hidden_state[:, 1:]
    return result


def scores_of(model: Any, pixels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Logits f32 `[replies' tokens, vocabulary]` and their labels, of packed rows."""
    language, tokens = model.model.language_model, rows.tokens.long()
    words = language.embed_tokens(tokens)
    features = model.model.multi_modal_projector(patches_of(model, pixels)).to(words.dtype)
    at = int((tokens[0] == model.config.image_token_index).nonzero()[0])
    inputs = torch.cat([words[:, :at], features, words[:, at + IMAGE_TOKENS :]], dim=1)
    positions, mask = rows.positions.long(), rows.mask()
    hidden = language(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    replies = rows.labels >= 0
    return model.lm_head(hidden[replies]).float(), rows.labels[replies].long()


@torch.no_grad()
def exact_shares(model: Any, tokenizer: Any, count: int, device: torch.device) -> dict[str, float]:
    """Shares of captions and answers about test scenes in which every token is the most likely one."""
    batch = scenes("test", torch.arange(count))
    pairs = [conversations(objects, i, ASKED) for i, objects in enumerate(scene_objects(batch))]
    rows, pixels = pack(pairs, tokenizer, model.config.image_token_index).to(device), draw(batch).to(device)
    hits: dict[str, list[float]] = {"captions": [], "answers": []}
    for part in torch.arange(count, device=device).split(100):
        part_rows = rows.part(part)
        scores, labels = scores_of(model, pixels[part], part_rows)
        right = torch.ones_like(part_rows.labels, dtype=torch.bool)
        right[part_rows.labels >= 0] = scores.argmax(-1) == labels
        for slot in range(1, ASKED + 2):
            own = part_rows.slots == slot
            hits["captions" if slot == 1 else "answers"] += (right | ~own).all(1)[own.any(1)].float().tolist()
    return {name: sum(values) / len(values) for name, values in hits.items()}


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Perplexity of rows of text, int64 `[n, tokens]`, under a causal model; `n` is a multiple of 4."""
    place = model.get_input_embeddings().weight.device
    losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) for part in rows.to(place).split(4)]
    return math.exp(sum(losses) / len(losses))
