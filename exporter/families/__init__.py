"""Model families mmq knows. To add one, write `families/NAME.py` with a `FAMILY` and add a line here."""

from exporter.families import llava
from exporter.families.family import Component, Family, Smoothing

FAMILIES: dict[str, Family] = {"llava": llava.FAMILY}

__all__ = ["FAMILIES", "Component", "Family", "Smoothing"]
