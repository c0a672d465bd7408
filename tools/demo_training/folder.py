"""The checkpoint folder of the demo model: config, tokenizer, processor, chat template, weights under hub names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.data.demo.language import vocabulary
from exporter.data.demo.scenes import SIDE
from exporter.model.families import FAMILIES

PATCH = 8  # pixels; 64 image tokens. Patch 16 trained worse.
HIDDEN, VISION_MLP, TEXT_MLP, VOCABULARY = 128, 512, 384, 256  # multiples of 128: group sizes and serving kernels
LONGEST = 512  # tokens
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)

# LLaVA-1.5's conversation without the system sentence, as in llava-hf's template.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == 'assistant' else '' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def config(vision_blocks: int, text_blocks: int, heads: int) -> dict[str, Any]:
    """config.json of a demo model with blocks of width 128."""
    vision: dict[str, Any] = {"model_type": "clip_vision_model", "hidden_size": HIDDEN, "image_size": SIDE}
    vision |= {"intermediate_size": VISION_MLP, "num_hidden_layers": vision_blocks, "num_attention_heads": heads}
    vision |= {"patch_size": PATCH, "projection_dim": HIDDEN, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}
    text |= {"intermediate_size": TEXT_MLP, "num_hidden_layers": text_blocks, "num_attention_heads": heads}
    text |= {"num_key_value_heads": heads, "head_dim": HIDDEN // heads, "vocab_size": VOCABULARY}
    text |= {"initializer_range": 0.05, "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": 10000.0}
    text |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "bfloat16",
        "image_token_index": IMAGE,
        "image_seq_length": (SIDE // PATCH) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "text_config": text,
        "vision_config": vision,
    }


def tokenizer(more: tuple[str, ...] = ()) -> Any:
    """A word-level `tokenizers.Tokenizer`: lower case, any text encodes (unknown words become `<unk>`).

    more: words beyond the vocabulary of the demo language.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [*SPECIAL, "\u2581", ".", ",", "?", ":", *("\u2581" + word for word in (*vocabulary(), *more))]
    # Every id of the output head has a token: vLLM 0.32 fails on a log-probability of an id without one.
    pieces += [f"<unused{i}>" for i in range(VOCABULARY - len(pieces))]
    result = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    result.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"[.,?:]"), "isolated"),
        ]
    )
    result.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    result.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", BOS)])
    result.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, lstrip=t == "<image>", rstrip=t == "<image>") for t in SPECIAL]
    )
    return result


def hub_tensors(
    model: torch.nn.Module, rename: Callable[[str], str] = FAMILIES["llava"].canonical_name
) -> dict[str, Tensor]:
    """Parameters in bfloat16 under the hub's names; transformers would drop `vision_model.`, which vLLM needs."""
    return {
        rename(name): tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with an indent of 2."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(
    out: Path, processor: str, longest: int = LONGEST, side: str = "left", more: tuple[str, ...] = ()
) -> None:
    """tokenizer.json and its two companion files. processor: class of the processor; side: padding side."""
    tokenizer(more).save(str(out / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(out / "special_tokens_map.json", tokens)
    extra: dict[str, Any] = {"model_max_length": longest, "padding_side": side}
    if processor == "LlavaProcessor":  # Blip2Processor adds the token itself and fails on this entry
        extra = {"image_token": "<image>", **extra}
    extra |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", {**tokens, **extra, "processor_class": processor})


def write_generation(out: Path) -> None:
    """generation_config.json: greedy, at most 64 tokens."""
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(out / "generation_config.json", {**tokens, "do_sample": False, "max_new_tokens": 64})


def write_processor(out: Path) -> None:
    """preprocessor_config.json and processor_config.json of a LLaVA with this tower's pictures."""
    pictures = {"do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3, "do_center_crop": True}
    pictures |= {"crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255}
    pictures |= {"do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD), "do_convert_rgb": True}
    pictures |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(out / "preprocessor_config.json", pictures)
    processor = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "image_token": "<image>"}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_json(out / "processor_config.json", processor)


def save(model: torch.nn.Module, settings: dict[str, Any], out: Path) -> None:
    """Write the complete folder that transformers and vLLM load."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(hub_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", settings)
    write_generation(out)
    write_tokenizer(out, "LlavaProcessor")
    write_processor(out)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def build(settings: dict[str, Any], seed: int) -> Any:
    """A new float32 `LlavaForConditionalGeneration` with transformers' initialization."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(settings)).float()
