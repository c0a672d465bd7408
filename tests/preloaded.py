"""Imported once by the fork server of `tests.children`, so that its children import nothing that an export needs.

It computes nothing, because torch's threads do not live on in a child.
"""

import importlib
from importlib.util import find_spec

import torch

import exporter.commands.main
import exporter.data.demo.samples
import exporter.pipeline.export  # noqa: F401
from exporter.model.families import FAMILIES
from exporter.transformers_import import import_transformers, only_mmq_runs_here

only_mmq_runs_here()
transformers = import_transformers()
PROCESSORS = transformers.AutoProcessor, transformers.Blip2Processor, transformers.LlavaProcessor

with torch.device("meta"):
    for family in (FAMILIES[name] for name in ("llava", "blip2", "blip2-itm")):  # that tests export in children
        family.skeleton(family.tiny_config())
for name in ("compressed_tensors.compressors", "transformers.quantizers.quantizer_compressed_tensors"):
    if find_spec("compressed_tensors"):
        importlib.import_module(name)
