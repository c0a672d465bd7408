"""Training, saving and scoring of the demo models. The package contains their weights, not this code."""
