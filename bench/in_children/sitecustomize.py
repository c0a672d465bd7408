"""Every Python process that a mutant's tests start imports this module first, so that it runs the mutant too."""

from bench.changed_module import load_from_environment

load_from_environment()
