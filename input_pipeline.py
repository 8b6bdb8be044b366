"""The door to data under the name that this project's users know; it is `simplest_vit.data.pipeline`."""

from simplest_vit.data.pipeline import Arrays as Arrays
from simplest_vit.data.pipeline import Batch as Batch
from simplest_vit.data.pipeline import Source as Source
from simplest_vit.data.pipeline import eval_batches as eval_batches
from simplest_vit.data.pipeline import load as load
from simplest_vit.data.pipeline import steps_per_epoch as steps_per_epoch
from simplest_vit.data.pipeline import train_batches as train_batches
