"""Drawings of cats and dogs: a pen, places, and the animals themselves."""
