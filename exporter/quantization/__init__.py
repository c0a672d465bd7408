"""Calibrate and quantize block by block.

Enters: a plan, a checkpoint, calibration batches.
Leaves: one finished unit per block in the work folder.
May import: planning, model, data, methods, numerics, files.
"""
