"""vLLM: how it is started, what it refuses, and whether its answers are right.

Enters: an artifact.
Leaves: a running server, or a `Check` of its answers.
May import: evaluation, artifact, planning, inference, model, tasks, numerics, files.
"""
