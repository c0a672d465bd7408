"""The export pipeline: prepare, quantize, write, verify, evaluate.

Enters: a recipe, data, a device, an output folder.
Leaves: an artifact with manifest and report.
May import: serving, evaluation, artifact, quantization, planning, model, data, numerics, files.
"""
