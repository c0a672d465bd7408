"""Studies: which parts of a model matter, and how many bits each part gets under a size budget.

Enters: a grid of settings or a budget, a model, data.
Leaves: a table of scores with intervals, plots, a recipe.
May import: pipeline, evaluation, artifact, quantization, planning, model, data, formats, methods, numerics, files.
"""
