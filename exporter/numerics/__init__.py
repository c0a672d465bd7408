"""Arithmetic on weights: quantized linears, ranges, Hessians, column loops, scale folding, Triton kernels.

Enters: tensors of one linear or one block.
Leaves: integers, scales, zero points, and sums of calibration inputs.
May import: no other room.
"""
