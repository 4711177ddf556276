"""Engines: what turns a complete request into frames."""
