"""Drawings of notebook 42, which a second paper's notebook uses too: they stand in `lib.plots`."""

from lib.plots import clipped_objective, token_heatmap

__all__ = ["clipped_objective", "token_heatmap"]
