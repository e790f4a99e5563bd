"""What is on disk: results, archives, names, averages; read without a model."""
