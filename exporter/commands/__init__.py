"""The command line: commands, tables, progress.

Enters: arguments.
Leaves: text, JSON lines and exit codes.
May import: study, publishing, pipeline, serving, evaluation, artifact, quantization, planning, model, data, numerics,
files.
"""
