"""`cgrpo vote`: a page on which people choose between the pictures that a run waits for."""
