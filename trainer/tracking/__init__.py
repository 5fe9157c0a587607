"""What a run tells: the metrics file, the progress in the terminal, W&B."""
