"""Changing parameters under IDs that stay: replacing, rows, constraints, freezing."""
