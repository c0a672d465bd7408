"""Sections of the model card about use: the command that makes the artifact again, Python examples, and hardware."""

from exporter.data import BUILT_IN
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES, Family
from exporter.publishing.artifact_summary import Summary

QUESTION = "What is in the picture?"


def creation(summary: Summary, base: str | None) -> str:
    """The command that makes this artifact from the recipe in the repository. base: hub id of the source."""
    _, _, commit = summary.source.partition("@")
    base = base or (summary.source if summary.source in MODELS else None)
    words = ["mmq export --recipe recipe.yaml", f"--model {base or 'MODEL'}"]
    words += [f"--revision {commit}"] if base and commit else []
    words += ["--adapter ADAPTER"] if summary.manifest.source.adapter else []
    evaluation = summary.report.evaluation.data if summary.report else None
    named = [*summary.manifest.provenance.calibration.data.split(", "), *(evaluation or "").split(", ")]
    local = [name for name in dict.fromkeys(named) if name and name not in BUILT_IN and not name.startswith("hub ")]
    words += [f"--data {_source(name)}" for name in local]
    note = "" if base else f"\n\n`MODEL` is the folder of the source model, `{summary.source}`."
    about = "`recipe.yaml` is in this repository. The same source and data give the same weights:"
    return f"{about}\n\n```\n{' '.join(words)}\n```{note}"


def _source(name: str) -> str:
    """A data source of the manifest (`coco train2017`, `folder images`) as an argument with a path to fill in."""
    kind = name.partition(" ")[0]
    return "PATH" if kind == "folder" else f"{kind}:PATH"


def python_example(repo: str, summary: Summary) -> str:
    """Python code that asks a server, and code for transformers."""
    family = FAMILIES[summary.manifest.family]
    if family.unserved:
        return ""
    client = (
        "From Python, with `pip install openai` and the server above:\n\n```python\nfrom openai import OpenAI\n\n"
        'client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")\n'
        'picture = {"type": "image_url", "image_url": {"url": "https://example.org/picture.jpg"}}\n'
        f'question = {{"type": "text", "text": "{QUESTION}"}}\n'
        'messages = [{"role": "user", "content": [picture, question]}]\n'
        f'answer = client.chat.completions.create(model="{repo}", messages=messages)\n'
        "print(answer.choices[0].message.content)\n```\n\n"
    )
    known = summary.manifest.format == "compressed_tensors"  # transformers reads the other formats with more libraries
    return client + (_transformers(repo, family) if known else "")


def _transformers(repo: str, family: Family) -> str:
    """Code for transformers, which dequantizes the weights: with the chat template, or with the family's prompt."""
    if family.fallback_prompt:
        prompt = family.fallback_prompt.format(text=family.text(QUESTION))
        made = f'inputs = processor(images=picture, text={prompt!r}, return_tensors="pt").to(model.device, model.dtype)'
    else:
        made = (
            f'content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "{QUESTION}"}}]\n'
            'messages = [{"role": "user", "content": content}]\n'
            "inputs = processor.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n'
            ").to(model.device, model.dtype)"
        )
    return (
        "Without vLLM, with `pip install transformers compressed-tensors`; the weights are dequantized to 16 bits:"
        "\n\n```python\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig\n\n"
        "dequantized = CompressedTensorsConfig(run_compressed=False)\n"
        "model = AutoModelForImageTextToText.from_pretrained(\n"
        f'    "{repo}", dtype="auto", quantization_config=dequantized\n'
        ")\n"
        f'processor = AutoProcessor.from_pretrained("{repo}")\n'
        'picture = Image.open("picture.jpg")\n'
        f"{made}\n"
        "tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)\n"
        "print(processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0])\n```"
    )


def hardware(summary: Summary) -> str:
    """The kernel of vLLM for each packed part, by hardware, and the device of the export."""
    unserved = FAMILIES[summary.manifest.family].unserved
    lines = [
        f"- {part.component}, {part.scheme}: {part.kernels}" for part in summary.parts if part.packed and part.kernels
    ]
    if unserved or not lines:
        lines = [f"- {unserved}" if unserved else "- all hardware that vLLM supports: nothing is packed"]
    return "\n".join([*lines, f"- quantized on: {summary.manifest.provenance.device}"])


def provenance(repo: str, summary: Summary) -> str:
    """Source, recipe, versions and device, and the command that compares the repository with its manifest."""
    versions = summary.manifest.versions
    shown = ", ".join(f"{name} {versions[name]}" for name in ("mmq", "torch", "transformers") if name in versions)
    return (
        f"- source: `{summary.source}`; the sha256 of its shards is in `mmq_manifest.json`\n"
        f"- recipe: `recipe.yaml` (sha256 `{summary.manifest.recipe.sha256}`)\n"
        f"- exported with {shown} on {summary.manifest.provenance.device}\n"
        f"- check this repository against its manifest: `mmq verify hub:{repo}`"
    )
