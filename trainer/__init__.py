"""Distributed fine-tuning of siamese sentence encoders: the same run on any number of ranks.

Nothing is imported here; write ``from trainer.losses import InfoNCE``.
"""
