"""What a run has trained, in the formats that others load."""
