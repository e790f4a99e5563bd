"""Which tasks are run, on which documents, with which prompts."""
