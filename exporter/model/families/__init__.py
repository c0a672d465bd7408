"""The model families that mmq supports. To add one, write `families/NAME.py` with a `FAMILY` and add a line here."""

from exporter.model.families import blip2, llava
from exporter.model.families.family import Component, Family, Pass, Smoothing

FAMILIES: dict[str, Family] = {"llava": llava.FAMILY, "blip2": blip2.FAMILY, "blip2-itm": blip2.RETRIEVAL}

__all__ = ["FAMILIES", "Component", "Family", "Pass", "Smoothing"]
