"""Adapters over stock diffusers pipelines, one file per family."""
