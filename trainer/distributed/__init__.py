"""Everything that knows ranks: collectives, strategies, the exactness self-check."""
