"""Which parameter is which: IDs, names, slots, and tensors that take the place of others."""
