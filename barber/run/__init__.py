"""A run: from its experiment to its record, and what people see of it."""
