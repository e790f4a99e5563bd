"""transformers: the attention function, loading of models, the bounded cache. Knows the engine."""
