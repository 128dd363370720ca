"""Parts of a model, by pattern, module, type or predicate; and the backbones of models."""
