"""Saving and loading state by name, without a guess."""
