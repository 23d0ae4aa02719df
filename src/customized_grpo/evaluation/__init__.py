"""What came out: pictures, numbers, tables, pages."""
