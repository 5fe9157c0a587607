"""From files of text to packed batches: sources -> tokens -> order -> collate."""
