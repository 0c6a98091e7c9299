"""Scenes: the synthetic data set whose annotations are complete and exact."""
