"""Vision transformers with and without normalization and skip connections: one `ViT`, presets by name."""

from simplest_vit.models.presets import PRESETS, VARIANTS, create_model, model_arguments
from simplest_vit.models.vit import ViT

__all__ = ["PRESETS", "VARIANTS", "ViT", "create_model", "model_arguments"]
