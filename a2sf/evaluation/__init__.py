"""lm-eval: the model class, packing of requests, tasks and their documents. Knows hf."""
