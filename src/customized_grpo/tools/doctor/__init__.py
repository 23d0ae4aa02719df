"""What is wrong, or soon will be, with this machine and a run that is planned, and its fix."""
