"""The files of task definitions: those of lm-eval by name, those in the user's folder, and the functions that they name."""
