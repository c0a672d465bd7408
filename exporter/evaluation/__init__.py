"""Evaluation: scores of an artifact and its source on the same samples, and the verdicts of the gates.

Enters: samples, the source, the artifact or a server.
Leaves: a `Report` with every score, interval and verdict.
May import: artifact, quantization, planning, model, data, numerics, files.
"""
