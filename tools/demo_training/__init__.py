"""How the demo models were trained, saved and scored; the package ships their weights, not this."""
