"""Evaluation: features, streamed statistics, FID, sweeps over step counts, class grids and reports."""
