"""From ten photos to a project: checks, prompts, and a config that `cgrpo train` runs as it is."""
