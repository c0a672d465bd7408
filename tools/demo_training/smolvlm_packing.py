"""The forward pass of the SmolVLM example that training and scoring share (a test compares with transformers).

A row is `<s> USER: <mark> <mark> [image] <mark>` followed by slots that each hold one conversation (see `packing`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.model.families.idefics3 import SMOLVLM as FAMILY
from tools.demo_training.folder import BOS, tokenizer
from tools.demo_training.packing import IMAGE_TOKENS, Forward, PromptLayout, encoder, text_logits, user_ids

AROUND = ("<unused0>", "<unused1>")  # ids of the marks around a picture and of the mark of a whole picture


def encode_image(model: Any, pixels: Tensor) -> Tensor:
    """Image tokens `[n, 64, 128]` from normalized pixels `[n, 3, 64, 64]`."""
    tower, heads = model.model.vision_model, model.config.vision_config.num_attention_heads
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    x = patches + embeddings.position_embedding.weight.to(patches.dtype)
    x = encoder(tower, x, heads, lambda hidden: F.gelu(hidden, approximate="tanh"))
    result: Tensor = model.model.connector(tower.post_layernorm(x))
    return result


def _forward(device: torch.device) -> Forward:
    words = tokenizer()
    mark, whole = (torch.tensor([words.token_to_id(name)]) for name in AROUND)
    before = torch.cat([torch.tensor([BOS]), user_ids(), mark, whole]).to(device)
    after = mark.to(device)

    def forward(model: Any, pixels: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        image = encode_image(model, pixels)
        return text_logits(model, model.model.text_model, image, (before, after), tokens, mask, positions)

    return forward


LAYOUT = PromptLayout(
    prefix=6 + IMAGE_TOKENS,
    start=(),
    question=f"{FAMILY.question_prompt} ASSISTANT:",
    caption=f"{FAMILY.caption_prompt} ASSISTANT:",
    caption_slot=58,
    question_slot=20,  # a training row then has 288 tokens, a multiple of 32
    words=(),
    forward=_forward,
)
