"""Shampoo and SOAP as optax transformations. Needs only jax, numpy and optax."""

from .axes import shampoo_metrics
from .options import static_args
from .shampoo import reference_shampoo, scale_by_shampoo, shampoo, shampoo_plan, view_as
from .soap import scale_by_soap, soap, soap_plan

__all__ = [
    "reference_shampoo",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "shampoo_metrics",
    "shampoo_plan",
    "soap",
    "soap_plan",
    "static_args",
    "view_as",
]
