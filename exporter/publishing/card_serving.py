"""Render the sections of the model card about serving and speed."""

import json

from exporter.artifact.recorded_prompts import with_recorded_prompts
from exporter.evaluation.speed_table import conditions, figures_rows
from exporter.model.families import FAMILIES, Family
from exporter.publishing.artifact_summary import Summary
from exporter.publishing.card_table import table
from exporter.serving.launch import TESTED_VERSION

QUESTION = "What is in the picture?"
VLLM_IMAGE = f"vllm/vllm-openai:v{TESTED_VERSION}"


def serving(repo: str, summary: Summary) -> str:
    """Commands for vLLM and Docker, a request, and the result of `mmq check`."""
    family = with_recorded_prompts(FAMILIES[summary.manifest.family], summary.manifest)
    if family.unserved:
        return _by_transformers(repo, family)
    limit = "--limit-mm-per-prompt '{\"image\": 1}'"
    if cache := summary.manifest.kv_cache:
        limit += f" --kv-cache-dtype {cache}"
    unusual = sorted({part.bits for part in summary.parts if part.packed and part.bits not in (4, 8)})
    note = ""
    if unusual:
        widths = " and ".join(map(str, unusual))
        note = f"\n\n{widths}-bit weights need vLLM 0.25.1 or later with `humming-kernels` on an NVIDIA GPU."
    return (
        f"```\nvllm serve {repo} {limit}\n```\n\n"
        "Or in a container:\n\n"
        "```\ndocker run --gpus all --ipc host -p 127.0.0.1:8000:8000 -e HF_TOKEN \\\n"
        "  -v ~/.cache/huggingface:/root/.cache/huggingface \\\n"
        f"  {VLLM_IMAGE} --model {repo} \\\n  {limit}\n```\n\n"
        "Send a question about a picture:\n\n"
        "```\ncurl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{\n"
        f'  "model": "{repo}",\n'
        '  "messages": [{"role": "user", "content": [\n'
        '    {"type": "image_url", "image_url": {"url": "https://example.org/picture.jpg"}},\n'
        f'    {{"type": "text", "text": {_text(summary, family)}}}]}}]}}\'\n```' + note + _checked(summary)
    )


def _text(summary: Summary, family: Family) -> str:
    """The example's text as JSON inside single quotes of a shell: a question, in the recipe's own prompt if it has one.

    A model without a prompt for questions gets its caption prompt.
    """
    own = summary.recipe.prompts
    text = family.text(QUESTION) if "vqa" in own else family.text(None) if "captioning" in own else QUESTION
    return json.dumps(text).replace("'", "'\\''")


def _by_transformers(repo: str, family: Family) -> str:
    """Python code that runs an image-text retrieval model, which vLLM does not serve, with transformers."""
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
    """Result of `mmq check`; empty when it did not run."""
    record = summary.serving
    if not record:
        return ""
    verdict = "agreed with" if record.passed and not record.problems else "**differed from**"
    return (
        f"\n\nvLLM {record.engine} ({record.build}) served this artifact and answered {record.questions} questions "
        f"about pictures; its log-probabilities {verdict} those of the dequantized weights in transformers (bound "
        f"{record.bound})."
    )


def speed_section(summary: Summary) -> str:
    """Result of `mmq bench`; empty when it did not run."""
    speed = summary.speed
    if speed is None:
        return ""
    rows = [list(row) for row in figures_rows(speed.artifact, speed.source)]
    about = f"{conditions(speed)}. Every request has its own picture"
    return f"## Speed and memory\n\n{about}.\n\n" + table(["", "this model", "source", "ratio"], rows)
