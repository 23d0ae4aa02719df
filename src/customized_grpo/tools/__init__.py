"""Commands around a run; training imports none of them."""
