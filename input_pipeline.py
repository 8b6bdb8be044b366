"""A shortcut in the clone to `simplest_vit.data.input_pipeline`."""

from simplest_vit.data.input_pipeline import Batch as Batch
from simplest_vit.data.input_pipeline import Dataset as Dataset
from simplest_vit.data.input_pipeline import DiskSplit as DiskSplit
from simplest_vit.data.input_pipeline import InMemorySplit as InMemorySplit
from simplest_vit.data.input_pipeline import eval_batches as eval_batches
from simplest_vit.data.input_pipeline import load as load
from simplest_vit.data.input_pipeline import steps_per_epoch as steps_per_epoch
from simplest_vit.data.input_pipeline import train_batches as train_batches
