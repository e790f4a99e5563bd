"""The needle task: can a model still find a fact in a long text when its cache is pruned? By depth, policy and budget."""

from a2sf.needle.table import needle_figure, needle_plot, needle_plots, needle_table, needle_tables

__all__ = ["needle_figure", "needle_plot", "needle_plots", "needle_table", "needle_tables"]
