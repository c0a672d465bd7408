"""Scores of an artifact beside its source, and the verdicts of its gates.

Enters: samples, the source, the artifact or a server.
Leaves: a `Report` with every score, interval and verdict.
May import: artifact, quantization, planning, inference, data, model, tasks, numerics, files.
"""
