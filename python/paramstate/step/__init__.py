"""One step: the compiled walk, and what torch does beside it."""
