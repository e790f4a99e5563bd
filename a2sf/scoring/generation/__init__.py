"""Texts that models write: rows of documents, samples and systems that are generated together."""
