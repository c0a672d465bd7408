"""The command line: commands, tables, progress.

Enters: arguments.
Leaves: text, JSON lines and exit codes.
May import: study, report, publishing, pipeline, serving, evaluation, artifact, quantization, planning, inference,
cluster, data, model, demo, tasks, numerics, files.
"""
