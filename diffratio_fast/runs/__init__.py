"""A run directory: its files, its log and its environment."""
