"""The part of the model card that tells how to serve the artifact."""

from exporter.model.families import FAMILIES, Family
from exporter.publishing.artifact_summary import Summary
from exporter.serving.launch import TRIED

VLLM_IMAGE = f"vllm/vllm-openai:v{TRIED}"


def serving(repo: str, summary: Summary, lacks_start: bool) -> str:
    """Commands for vLLM and Docker, a request, and what `mmq check` found. lacks_start: see `card.render`."""
    family = FAMILIES[summary.manifest.family]
    if family.unserved:
        return _by_transformers(repo, family)
    limit = "--limit-mm-per-prompt '{\"image\": 1}'"
    odd = sorted({part.bits for part in summary.parts if part.packed and part.bits not in (4, 8)})
    note = ""
    if odd:
        widths = " and ".join(map(str, odd))
        note = f"\n\n{widths}-bit weights need vLLM 0.25.1 or later with `humming-kernels` on an NVIDIA GPU."
    if lacks_start:
        note = (
            "\n\n`add_special_tokens` is needed with every request: the model's chat template does not write the start "
            "token that its training prompts began with, and without it answers are others. `mmq serve` of a local "
            "copy hands over a template that does." + note
        )
    return (
        f"```\nvllm serve {repo} {limit}\n```\n\n"
        "or in a container:\n\n"
        "```\ndocker run --gpus all --ipc host -p 127.0.0.1:8000:8000 -e HF_TOKEN \\\n"
        "  -v ~/.cache/huggingface:/root/.cache/huggingface \\\n"
        f"  {VLLM_IMAGE} --model {repo} \\\n  {limit}\n```\n\n"
        "and ask about a picture:\n\n"
        "```\ncurl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{\n"
        f'  "model": "{repo}",\n'
        + ('  "add_special_tokens": true,\n' if lacks_start else "")
        + '  "messages": [{"role": "user", "content": [\n'
        '    {"type": "image_url", "image_url": {"url": "https://example.org/picture.jpg"}},\n'
        '    {"type": "text", "text": "What is in the picture?"}]}]}\'\n```' + note + _checked(summary)
    )


def _by_transformers(repo: str, family: Family) -> str:
    """How to open what no engine serves, image-text retrieval."""
    architecture = family.architectures[0]
    return (
        f"{family.unserved}, with `pip install transformers compressed-tensors`:\n\n```python\n"
        f"from transformers import AutoProcessor, {architecture}\n\n"
        f'model = {architecture}.from_pretrained("{repo}")\n'
        f'processor = AutoProcessor.from_pretrained("{repo}")\n'
        'inputs = processor(images=picture, text="two dogs on a beach", return_tensors="pt")\n'
        "similar = model(**inputs, use_image_text_matching_head=False).logits_per_image\n"
        "match = model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1]\n```"
    )


def _checked(summary: Summary) -> str:
    """What `mmq check` found in the engine, when it ran."""
    found = summary.serving
    if not found:
        return ""
    verdict = "agreed with" if found.passed and not found.problems else "**differed from**"
    return (
        f"\n\nvLLM {found.engine} ({found.build}) served it and answered {found.questions} questions about "
        f"pictures; its log-probabilities {verdict} the dequantized weights in transformers (bound {found.bound})."
    )
