"""A command a module: its arguments and what it prints. Heavy modules are imported when it runs."""
