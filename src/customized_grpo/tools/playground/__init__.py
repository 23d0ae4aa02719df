"""`cgrpo playground`: pictures of your own on a page, base beside tuned.

``session`` does the work and knows no page; ``page`` shows it and knows no model.
"""
