"""From a packed batch to embeddings: backbone, attention over packed segments, pooling, vocabulary."""

from trainer.encoder.encoder import Encoder, EncoderSpec

__all__ = ["Encoder", "EncoderSpec"]
