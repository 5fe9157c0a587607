"""Hard negatives from a trained encoder."""
