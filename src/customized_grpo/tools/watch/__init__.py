"""A running job, seen from its folder alone: what is known of it, and how a terminal shows it."""
