"""Embeds texts: BERT-family encoders, GTE v1.5 and our own decoders, in length-bucketed compiled batches."""

from safelm.safety.embedding.backbone import Backbone, installed_path, load_backbone
from safelm.safety.embedding.embedder import Embedder

__all__ = ["Backbone", "Embedder", "installed_path", "load_backbone"]
