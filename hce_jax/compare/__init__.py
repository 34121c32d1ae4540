"""Trained models compared: what the hierarchical loss gains, on which cells, for which cell types."""
