"""The proof of an artifact before its upload: every claim of its files, checked against what mmq computes itself.

Enters: an artifact folder.
Leaves: its summary, and every reason not to publish it.
May import: publishing, serving, evaluation, artifact, planning, model, data, formats, numerics.
"""
