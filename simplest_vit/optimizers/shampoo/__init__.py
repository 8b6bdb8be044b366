"""Shampoo and SOAP as optax transformations. Needs only jax, numpy and optax."""

from .metrics import shampoo_metrics
from .options import ShampooOptions, SoapOptions
from .plan import shampoo_plan
from .shampoo import scale_by_shampoo, shampoo
from .soap import scale_by_soap, soap
from .view import view_as

__all__ = [
    "ShampooOptions",
    "SoapOptions",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "shampoo_metrics",
    "shampoo_plan",
    "soap",
    "view_as",
]
