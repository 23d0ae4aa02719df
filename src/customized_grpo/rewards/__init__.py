"""Reward models, one file per kind, and the set that scores a batch with all of them."""
