"""Watching for a collapse, without labels."""
