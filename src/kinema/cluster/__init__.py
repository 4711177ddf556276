"""Clusters: where tasks run."""
