"""Which parts of a model matter, measured: grids of settings, importance, and bits chosen under a size budget."""
