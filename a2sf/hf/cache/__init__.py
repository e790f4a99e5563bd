"""`PrunedCache`: a cache that a policy keeps small, for a model that generates."""
