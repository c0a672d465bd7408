"""Serving with vLLM: the start command, checks before the start, and the comparison of its answers.

Enters: an artifact.
Leaves: a running server, or a `CheckResult` of its answers.
May import: evaluation, artifact, planning, model, data, numerics.
"""
