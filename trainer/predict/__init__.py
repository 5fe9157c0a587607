"""Embeddings of a whole corpus, in files."""
