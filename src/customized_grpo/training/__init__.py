"""One update of the policy, and the life of a run."""
