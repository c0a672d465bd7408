"""The artifact folder: write it, open it, verify it.

Enters: finished units, the plan, the source checkpoint.
Leaves: a folder that vLLM opens, its manifest, and a `Verification`.
May import: quantization, planning, model, data, formats, numerics, files.
"""
