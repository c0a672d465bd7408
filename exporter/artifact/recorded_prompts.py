"""The prompts that an artifact's manifest records, as part of its family."""

from exporter.artifact.manifest import Manifest
from exporter.model.families import Family
from exporter.planning.prompts import prompted


def with_recorded_prompts(family: Family, manifest: Manifest) -> Family:
    """The family with the prompts and answer lengths in a manifest; an older mmq recorded none."""
    records = {task: record for task, record in manifest.prompts.items() if task in family.max_new_tokens}
    prompts = {task: record.prompt for task, record in records.items()}
    return prompted(family, prompts, {task: record.max_new_tokens for task, record in records.items()})
