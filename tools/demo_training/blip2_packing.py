"""The forward passes of the two BLIP-2 demo models that training and scoring share (a test compares with transformers).

Captioning: the picture's query tokens, then slots that each hold one conversation, as `packing` describes. Retrieval:
query tokens and text tokens through one Q-Former, under a mask that says who sees whom.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_training.blip2_folder import MORE_WORDS, OPT_OFFSET, QUERIES
from tools.demo_training.folder import BOS
from tools.demo_training.packing import Forward, Talk

QUESTION_PROMPT = "Question: {question} Short answer:"  # the paper's; captions have no prompt


def _split(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # [n, heads, t, d]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, sees: Tensor | None = None) -> Tensor:
    q, k, v = _split(q, heads), _split(k, heads), _split(v, heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2)


def see(model: Any, pixels: Tensor) -> Tensor:
    """What the ViT makes of normalized pixels `[n, 3, 64, 64]`: `[n, 65, 128]`."""
    tower, heads = model.vision_model, model.config.vision_config.num_attention_heads
    seen = tower.embeddings
    patches = seen.patch_embedding(pixels).flatten(2).transpose(1, 2)
    first = seen.class_embedding.expand(pixels.shape[0], 1, -1).to(patches.dtype)
    x = torch.cat([first, patches], dim=1) + seen.position_embedding.to(patches.dtype)
    for block in tower.encoder.layers:
        q, k, v = block.self_attn.qkv(block.layer_norm1(x)).chunk(3, dim=-1)
        x = x + block.self_attn.projection(_attend(q, k, v, heads))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.layer_norm2(x))))
    result: Tensor = tower.post_layernorm(x)
    return result


def _bert(part: Any, x: Tensor, source: Tensor, heads: int, sees: Tensor | None) -> Tensor:
    attention = part.attention
    mixed = _attend(attention.query(x), attention.key(source), attention.value(source), heads, sees)
    result: Tensor = part.output.LayerNorm(part.output.dense(mixed) + x)
    return result


def _feed(first: Any, second: Any, x: Tensor) -> Tensor:
    result: Tensor = second.LayerNorm(second.dense(F.gelu(first.dense(x))) + x)
    return result


def former(
    model: Any, x: Tensor, image: Tensor | None, sees: Tensor | None = None, after: list[Tensor] | None = None
) -> Tensor:
    """The Q-Former on embeddings `[n, t, 128]`, query tokens first when there is an image `[n, 65, 128]`, else text.

    sees: bool, broadcast to `[n, heads, t, t]`; None lets everyone see everyone. after: gets every block's output.
    """
    part, heads = model.qformer, model.config.qformer_config.num_attention_heads
    x = part.layernorm(x)
    for block in part.encoder.layer:
        x = _bert(block.attention, x, x, heads, sees)
        x = _feed(block.intermediate, block.output, x) if image is None else _both(block, x, image, heads)
        if after is not None:
            after.append(x)
    return x


def _both(block: Any, x: Tensor, image: Tensor, heads: int) -> Tensor:
    """Queries look at the picture where the block can; queries and text have feed-forwards of their own."""
    queries, text = x[:, :QUERIES], x[:, QUERIES:]
    if block.has_cross_attention:
        queries = _bert(block.crossattention, queries, image, heads, None)
    queries = _feed(block.intermediate_query, block.output_query, queries)
    return torch.cat([queries, _feed(block.intermediate, block.output, text)], dim=1) if text.shape[1] else queries


def queries_of(model: Any, count: int) -> Tensor:
    """The learned query tokens for `count` pictures, `[count, 32, 128]`."""
    result: Tensor = model.query_tokens.expand(count, -1, -1)
    return result


def logits(model: Any, pixels: Tensor, tokens: Tensor, sees: Tensor, positions: Tensor) -> Tensor:
    """Next-token logits `[n, slots' tokens, vocabulary]` of the captioning model; pixels are normalized."""
    decoder, heads = model.language_model.model.decoder, model.config.text_config.num_attention_heads
    image = model.language_projection(former(model, queries_of(model, pixels.shape[0]), see(model, pixels)))
    x = torch.cat([image, decoder.embed_tokens(tokens).to(image.dtype)], dim=1)
    x = x + F.embedding(positions + OPT_OFFSET, decoder.embed_positions.weight).to(x.dtype)
    for block in decoder.layers:
        normed, attention = block.self_attn_layer_norm(x), block.self_attn
        mixed = _attend(attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed), heads, sees)
        x = x + attention.out_proj(mixed)
        x = x + block.fc2(F.relu(block.fc1(block.final_layer_norm(x))))
    result: Tensor = model.language_model.lm_head(decoder.final_layer_norm(x[:, QUERIES:]))
    return result


def _forward(device: torch.device) -> Forward:
    return logits


BLIP2 = Talk(
    prefix=QUERIES,
    start=(BOS,),
    question=QUESTION_PROMPT,
    caption="",
    caption_slot=40,
    question_slot=20,
    words=MORE_WORDS,
    forward=_forward,
)
