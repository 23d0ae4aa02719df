"""Rewards that other processes give, over HTTP."""
