"""In what precision state is kept: the declared dtype of moments, and moments in eight bits."""
