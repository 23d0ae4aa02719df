"""`cgrpo serve-reward`: rewards behind the HTTP protocol of docs/remote_rewards.md.

Imports no model library itself: a reward with pins of its own is served from its own environment.
"""
