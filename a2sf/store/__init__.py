"""Results on disk: cells, archives, names, scores of groups. Reading them needs no model."""
