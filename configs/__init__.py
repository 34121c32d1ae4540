"""Configurations of runs; ``common.py`` has every field."""
