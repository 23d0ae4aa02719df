"""A run on disk and across processes."""
