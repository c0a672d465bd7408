"""Publishing: the report of an artifact, its model card, the proof before the upload, its repository on the hub.

Enters: an artifact, in a folder or in a repository.
Leaves: a page of its results; a proven repository; differences between two artifacts.
May import: pipeline, serving, evaluation, artifact, planning, model, data, formats, numerics, files.
"""
