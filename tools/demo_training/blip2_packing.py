"""The forward passes of the two BLIP-2 demo models that training and scoring share (a test compares with transformers).

Captioning: the picture's query tokens, then slots that each hold one conversation (see `packing`). Retrieval: query
tokens and text tokens pass through one Q-Former with an attention mask.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_training.blip2_folder import MORE_WORDS, OPT_OFFSET, QUERIES
from tools.demo_training.folder import BOS
from tools.demo_training.packing import Forward, PromptLayout

QUESTION_PROMPT = "Question: {question} Short answer:"  # the paper's; captions have no prompt


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # [n, heads, t, d]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = _split_heads(q, heads), _split_heads(k, heads), _split_heads(v, heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def encode_image(model: Any, pixels: Tensor) -> Tensor:
    """ViT outputs `[n, 65, 128]` of normalized pixels `[n, 3, 64, 64]`."""
    tower, heads = model.vision_model, model.config.vision_config.num_attention_heads
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    first = embeddings.class_embedding.expand(pixels.shape[0], 1, -1).to(patches.dtype)
    x = torch.cat([first, patches], dim=1) + embeddings.position_embedding.to(patches.dtype)
    for block in tower.encoder.layers:
        q, k, v = block.self_attn.qkv(block.layer_norm1(x)).chunk(3, dim=-1)
        x = x + block.self_attn.projection(_attend(q, k, v, heads))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.layer_norm2(x))))
    result: Tensor = tower.post_layernorm(x)
    return result


def _attention_block(part: Any, x: Tensor, source: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    attention = part.attention
    mixed = _attend(attention.query(x), attention.key(source), attention.value(source), heads, mask)
    result: Tensor = part.output.LayerNorm(part.output.dense(mixed) + x)
    return result


def _feed_forward(first: Any, second: Any, x: Tensor) -> Tensor:
    result: Tensor = second.LayerNorm(second.dense(F.gelu(first.dense(x))) + x)
    return result


def qformer(
    model: Any, x: Tensor, image: Tensor | None, mask: Tensor | None = None, outputs: list[Tensor] | None = None
) -> Tensor:
    """The Q-Former on embeddings `[n, t, 128]`, query tokens first when there is an image `[n, 65, 128]`, else text.

    mask: bool, broadcast to `[n, heads, t, t]`; None attends to all tokens. outputs: every block's output is appended.
    """
    part, heads = model.qformer, model.config.qformer_config.num_attention_heads
    x = part.layernorm(x)
    for block in part.encoder.layer:
        x = _attention_block(block.attention, x, x, heads, mask)
        x = (
            _feed_forward(block.intermediate, block.output, x)
            if image is None
            else _block_with_image(block, x, image, heads)
        )
        if outputs is not None:
            outputs.append(x)
    return x


def _block_with_image(block: Any, x: Tensor, image: Tensor, heads: int) -> Tensor:
    """Queries attend to the picture if the block has cross-attention; queries and text have separate feed-forwards."""
    queries, text = x[:, :QUERIES], x[:, QUERIES:]
    if block.has_cross_attention:
        queries = _attention_block(block.crossattention, queries, image, heads, None)
    queries = _feed_forward(block.intermediate_query, block.output_query, queries)
    return (
        torch.cat([queries, _feed_forward(block.intermediate, block.output, text)], dim=1) if text.shape[1] else queries
    )


def queries_of(model: Any, count: int) -> Tensor:
    """The learned query tokens for `count` pictures, `[count, 32, 128]`."""
    result: Tensor = model.query_tokens.expand(count, -1, -1)
    return result


def logits(model: Any, pixels: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Next-token logits `[n, slots' tokens, vocabulary]` of the captioning model; pixels are normalized."""
    decoder, heads = model.language_model.model.decoder, model.config.text_config.num_attention_heads
    image = model.language_projection(qformer(model, queries_of(model, pixels.shape[0]), encode_image(model, pixels)))
    x = torch.cat([image, decoder.embed_tokens(tokens).to(image.dtype)], dim=1)
    x = x + F.embedding(positions + OPT_OFFSET, decoder.embed_positions.weight).to(x.dtype)
    for block in decoder.layers:
        normed, attention = block.self_attn_layer_norm(x), block.self_attn
        mixed = _attend(attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed), heads, mask)
        x = x + attention.out_proj(mixed)
        x = x + block.fc2(F.relu(block.fc1(block.final_layer_norm(x))))
    result: Tensor = model.language_model.lm_head(decoder.final_layer_norm(x[:, QUERIES:]))
    return result


def _forward(device: torch.device) -> Forward:
    return logits


BLIP2 = PromptLayout(
    prefix=QUERIES,
    start=(BOS,),
    question=QUESTION_PROMPT,
    caption="",
    caption_slot=40,
    question_slot=20,
    words=MORE_WORDS,
    forward=_forward,
)
