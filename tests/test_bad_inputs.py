"""Mistakes in configs, flags, files and the environment: each ends with 2, is told in one line, and leaves nothing.

Each row is a command line and words of its line on standard error, where {new} is an empty folder and {old} holds what
`old` makes. All run as processes of their own; `ForkServer` makes that cheap.
"""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from simplest_vit.data.prepare import prepare

ROOT = pathlib.Path(__file__).parents[1]

# What a run logs before its mistake can be found.
LOG = re.compile(r"\d\d:\d\d:\d\d  |preparing |(?!error: ).*: not a complete image")

# (optimizer, field, value, expected)
FIELDS = [
    ("adam", "batch_size", "0", "an integer from 1"),
    ("adam", "batch_size", "-128", "an integer from 1"),
    ("adam", "batch_size", "128.0", "an integer from 1"),
    ("adam", "batch_size", "True", "an integer from 1"),
    ("adam", "batch_size", "10**12", "an integer from 1 to 2,147,483,647"),
    ("adam", "batch_size", "None", "an integer from 1"),
    ("adam", "batch_size", "[128]", "an integer from 1"),
    ("adam", "accumulation_steps", "0", "an integer from 1"),
    ("adam", "accumulation_steps", "3", "a divisor of config.batch_size=128"),
    ("adam", "seed", "-1", "an integer from 0"),
    ("adam", "seed", "2**40", "an integer from 0"),
    ("adam", "epochs", "0", "a number in (0, "),
    ("adam", "epochs", "nan", "a number in (0, "),
    ("adam", "epochs", "1e9", "a number in (0, 1e6]"),
    ("adam", "steps", "0", "an integer from 1 to 2,147,483,647, or None"),
    ("adam", "steps", "'many'", "an integer from 1"),
    ("adam", "warmup_steps", "-1", "an integer from 0"),
    ("adam", "grad_clip", "-1.0", "a number in [0, "),
    ("adam", "grad_clip", "inf", "a number in [0, "),
    ("adam", "weight_decay", "nan", "a number in [0, "),
    ("adam", "weight_decay", "'5e-5'", "a number in [0, "),
    ("adam", "decoupled_weight_decay", "1", "True or False"),
    ("adam", "label_smoothing", "1.0", "a number in [0, 1)"),
    ("adam", "label_smoothing", "-0.1", "a number in [0, 1)"),
    ("adam", "compute_dtype", "'float16'", "one of float32, bfloat16"),
    ("adam", "compute_dtype", "None", "one of float32, bfloat16"),
    ("adam", "max_skipped_steps", "0", "an integer from 1"),
    ("adam", "eval_every", "0", "an integer from 1"),
    ("adam", "checkpoint_every", "-5", "an integer from 1"),
    ("adam", "log_every", "2.5", "an integer from 1"),
    ("adam", "log_every", "'2 weeks'", "an integer from 1, or of epochs, such as '0.5 epochs'"),
    ("adam", "eval_every", "'0 epochs'", "such as '0.5 epochs'"),
    ("adam", "checkpoint_every", "'1.2.3 epochs'", "such as '0.5 epochs'"),
    ("adam", "sam.rho", "-0.05", "a number in [0, "),
    ("adam", "sam.every", "0", "an integer from 1"),
    ("adam", "ema.decay", "1.0", "a number in [0, 1)"),
    ("adam", "ema.every", "0", "an integer from 1"),
    ("adam", "profile.first_step", "-1", "an integer from 0"),
    ("adam", "profile.num_steps", "0", "an integer from 1"),
    ("adam", "model.name", "'resnet'", "is unknown; expected one of simplest_vit, isometric_vit"),
    ("adam", "model.name", "None", "a name"),
    ("adam", "model.variant", "'XXL'", "is unknown; expected one of Ti, S, B, L"),
    ("adam", "model.depth", "0", "an integer from 1"),
    ("adam", "model.depth", "10**9", "an integer from 1 to 1,000"),
    ("adam", "model.width", "-48", "an integer from 1"),
    ("adam", "model.width", "6", "a multiple of 4 and at least 8"),
    ("adam", "model.num_heads", "5", "config.model.width=48 is not divisible by config.model.num_heads=5"),
    ("adam", "model.mlp_dim", "0", "an integer from 1"),
    ("adam", "model.patch_size", "3", "does not divide the image size 8 x 8"),
    ("adam", "model.patch_size", "0", "an integer from 1"),
    ("adam", "model.dropout", "1.0", "a number in [0, 1)"),
    ("adam", "model.remat", "'yes'", "True or False"),
    ("adam", "model.attention", "'unshaped'", "is unknown; expected one of espa"),
    ("adam", "model.activation", "'gelu'", "is unknown; expected one of"),
    ("adam", "model.init", "'xavier'", "is unknown; expected one of espa_tat, reference"),
    ("adam", "model.gamma_max_depth", "0.0", "a number in [1e-9, 10]"),
    ("adam", "model.gamma_max_depth", "50.0", "a number in [1e-9, 10]"),
    ("adam", "model.rho_max_depth", "1.0", "a number in [1e-9, 0.999999]"),
    ("adam", "model.c_val_0_target", "1.5", "a number in [1e-6, 0.9999]"),
    ("adam", "model.c_val_0_target", "0.9999", "is out of reach for depth 12"),
    ("adam", "model.uniform_fraction", "0.0", "a number in (0, 1)"),
    ("adam", "model.uniform_fraction", "1.0", "a number in (0, 1)"),
    ("adam", "model.identity_head_fraction", "0.0", "a number in (0, 1]"),
    ("adam", "model.c_val_0_target", "0.99", "is out of reach for depth 12"),
    ("adam", "model", "3", "config.model is unknown"),
    ("adam", "data.name", "'mnist'", "one of digits, cifar10"),
    ("adam", "data.dir", "3", "the path of a folder, or None"),
    ("adam", "data.dir", "'~nobody-of-this-name/data'", "there is no such user; give another path"),
    ("adam", "data.dir", "'gs://bucket/data'", "config.data.dir=gs://bucket/data: gs: is not supported; give"),
    ("adam", "data.dir", "'file://host/data'", "config.data.dir=file://host/data: file://host is not supported; give"),
    ("adam", "data.manual_dir", "''", "the path of a folder"),
    ("adam", "data.image_size", "-8", "an integer from 1"),
    ("adam", "data.image_size", "9", "does not divide the image size 9 x 9"),
    ("adam", "data.random_resized_crop", "0.5", "True or False"),
    ("adam", "data.crop_padding", "-4", "an integer from 0"),
    ("adam", "data.flip", "'left'", "True or False"),
    ("adam", "data.rand_augment.num_ops", "-1", "an integer from 0"),
    ("adam", "data.rand_augment.magnitude", "31", "an integer from 0 to 30"),
    ("adam", "data.mixup_alpha", "-0.2", "a number in [0, "),
    ("adam", "data.cutmix_alpha", "nan", "a number in [0, "),
    ("adam", "data.mixup_mode", "'pixel'", "one of batch, example"),
    ("adam", "data.device_budget_bytes", "-1", "an integer from 0"),
    ("adam", "data.num_workers", "10**6", "an integer from 0 to 1,024"),
    ("adam", "optimizer.name", "'lino'", "is unknown; did you mean lion?"),
    ("adam", "optimizer.learning_rate", "0.0", "a number in (0, "),
    ("adam", "optimizer.learning_rate", "'1e-3'", "a number in (0, "),
    ("adam", "optimizer.b1", "1.0", "a number in [0, 1)"),
    ("adam", "optimizer.b2", "-0.5", "a number in [0, 1)"),
    ("adam", "optimizer.eps", "0.0", "a number in (0, "),
    ("adam", "optimizer.nesterov", "'yes'", "True or False"),
    ("adam", "optimizer.beta", "0.9", "config.optimizer.beta is unknown; "),
    ("muon", "optimizer.beta", "1.0", "a number in [0, 1)"),
    ("muon", "optimizer.adam_learning_rate", "-1e-3", "a number in (0, "),
    ("shampoo", "optimizer.preset", "'reference'", "config.optimizer.preset is unknown; "),
    ("shampoo", "optimizer.b1", "1.0", "it must be in [0, 1)"),
    ("shampoo", "optimizer.b2", "'0.99'", "it must be in (0, 1]"),
    ("shampoo", "optimizer.eps", "0.0", "it must be finite and > 0"),
    ("shampoo", "optimizer.eps", "nan", "it must be finite and > 0"),
    ("shampoo", "optimizer.precondition_frequency", "0", "it must be an integer >= 1"),
    ("shampoo", "optimizer.start_preconditioning_step", "-1", "it must be an integer >= 0"),
    ("shampoo", "optimizer.max_preconditioner_dim", "0", "it must be an integer >= 1"),
    ("shampoo", "optimizer.root", "'svd'", "it must be one of ('auto', 'eigh', 'newton')"),
    ("shampoo", "optimizer.grafting", "'lion'", "it must be one of ('none', "),
    ("shampoo", "optimizer.stagger", "2", "it must be True or False"),
    ("soap", "optimizer.basis", "'svd'", "it must be one of ('auto', 'qr', 'gram_schmidt', 'eigh')"),
    ("soap", "optimizer.eps", "-1.0", "it must be finite and > 0"),
    ("soap", "optimizer.root", "'eigh'", "config.optimizer.root is unknown; did you mean"),
    ("adam", "weigth_decay", "0.1", "is unknown; did you mean config.weight_decay?"),
    ("adam", "model.heads", "3", "is unknown; did you mean"),
    (
        "adam",
        "log_every",
        "missing",
        "is missing; its default is 24 (interval between reports",
    ),
    ("adam", "optimizer", "missing", "config.optimizer.name is missing"),
    ("adam", "data.rand_augment", "missing", "config.data.rand_augment.num_ops is missing"),
]

# Config files, and what is said of them.
CONFIGS = {
    "syntax.py": ("def get_config(:", "--config cannot be loaded: SyntaxError: invalid syntax (syntax.py, line 1)"),
    "without.py": ("x = 3", "has no attribute 'get_config'"),
    "raises.py": ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
    "imports.py": ("import nonsuch", "No module named 'nonsuch'"),
    "returns.py": ("def get_config():\n    return {'seed': 1}", "must return a ConfigDict"),
    "nothing.py": ("def get_config():\n    pass", "must return a ConfigDict"),
    "empty.py": (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()",
        "config.seed is missing",
    ),
    "text.py": ("Dear config,", "SyntaxError"),
    "binary.py": ("\0\1\2", "--config cannot be loaded"),
}

IMPORT = "simplest_vit import_reference --config configs/digits.py --workdir {new}/run"
SWEEP = "simplest_vit sweep --config configs/digits.py"
DIGITS = "main.py --config configs/digits.py --workdir {new}/run"
INIT_FROM = DIGITS + " --config.data.dir={old}/data --config.init_from"
OLD = "main.py --config {old}/tiny.py --workdir {old}"
CIFAR = "main.py --config configs/cifar10.py --workdir {new}/run --config.data.dir={new}/data"
PREPARE = "simplest_vit prepare"
PREDICT = "main.py predict --workdir {new}/run"
EVALUATE = "main.py evaluate"
PREVIEW = "simplest_vit preview --config configs/digits.py --config.data.dir={old}/data"

# (command, expected)
COMMANDS = [
    ("main.py", "a command is missing; expected one of train, "),
    (
        "main.py --workdir {new}/run --config.steps=3",
        "--config.steps sets a field of a config, and --config is",
    ),
    ("main.py --workdir {new}/run", "holds no checkpoint; train there first with --config, or"),
    ("main.py --config configs/digits.py", "--workdir is missing; usage: "),
    ("main.py --config configs/digits.py --workdir=", "--workdir is missing; usage: "),
    ("main.py --config configs/none.py --workdir {new}/run", "--config=configs/none.py: there is no such file; "),
    ("main.py --config {old} --workdir {new}/run", "Is a directory"),
    (
        "main.py --config cifar11:model=simple_vit --workdir {new}/run",
        "--config=cifar11: there is no such recipe; expected cifar10, cifar100, digits, imagenet, ",
    ),
    ("main.py --config digits --config.epochs=x:y --workdir {new}/run", "error: config.epochs=x:y must be a number in"),
    ("main.py --config digits:optimizer=sopa --workdir {new}/run", "error: config.optimizer.name='sopa' is unknown; "),
    ("main.py --config configs/digits.py:model=resnet --workdir {new}/run", "config argument model=resnet is unknown"),
    ("main.py --config configs/digits.py:optimiser=adam --workdir {new}/run", "'optimiser=adam' is unknown; expected"),
    ("main.py --config configs/digits.py:adam --workdir {new}/run", "config argument 'adam' is unknown"),
    ("main.py fly", "command 'fly' is unknown; expected one of train, "),
    (DIGITS + " --mod fly --wrkdir", "Unknown command line flag"),
    (DIGITS + " more", "unexpected argument 'more'"),
    (DIGITS + " --config.epoch=3", "names 'epoch', which is not a field"),
    (DIGITS + " --config.model.deep=3", "names 'deep', which is not a field"),
    (DIGITS + " --config.epochs=many", "config.epochs=many must be a number"),
    (DIGITS + " --config.steps=1.5", "config.steps=1.5 must be an integer"),
    (DIGITS + " --config.model.depth=1e3", "config.model.depth=1e3 must be an integer"),
    (DIGITS + " --config.data.flip=maybe", "config.data.flip=maybe must be True or False"),
    (DIGITS + " --config.model=simple_vit", "--config.model=simple_vit"),
    (DIGITS + " --config.batch_size", "Missing value for flag --config.batch_size"),
    (DIGITS + " --config.weight_decay=-1", "config.weight_decay=-1.0 must be"),
    (PREDICT, "--images is missing"),
    (PREDICT + " --images {new}/none.jpg", "none.jpg does not exist"),
    (
        "main.py export --workdir {new}/run --output {new}/x --format=tf",
        "one of stablehlo, onnx, safetensors, pth",
    ),
    ("main.py export --workdir {new}/run --output {new}/x --format=stablehlo", "holds no checkpoint; train there"),
    (PREDICT + " --images {old}/empty", "has no images"),
    (PREDICT + " --images {old}/text.jpg", "holds no checkpoint; train there first"),
    ("main.py predict --workdir {old}/run --images {old}/cut.jpg", "cut.jpg: not a complete image"),
    (OLD + "/old_version", "was made by version 0.1 of this project, this is 0."),
    ("main.py predict --workdir {old}/damaged_dataset --images {old}/cut.jpg", "dataset.json"),
    ("main.py predict --workdir {old}/lost_dataset --images {old}/cut.jpg", "dataset.json cannot be read"),
    (
        DIGITS + " --config.data.image_size=-5",
        "config.data.image_size=-5 must be",
    ),
    (PREDICT + " --process_id=0", "Unknown command line flag 'process_id'"),
    (EVALUATE + " --config configs/digits.py --workdir {new}/run --json", "Unknown command line flag 'json'"),
    (DIGITS + " --images a.jpg", "Unknown command line flag 'images'"),
    (DIGITS + " --coordinator_address=localhost:99999 --num_processes=2 --process_id=1", "must be HOST:PORT"),
    (
        DIGITS + " --coordinator_address=localhost:1 --num_processes=2 --process_id=1 --config.log_every=0",
        "config.log_every=0 must be",
    ),
    (
        EVALUATE + " --config configs/digits.py --workdir {new}/run --config.data.dir={old}/data",
        "holds no checkpoint; train there first",
    ),
    (
        DIGITS + " --config.batch_size=2048 --config.accumulation_steps=2048 --config.data.dir={old}/data",
        "more than the 1437 training examples",
    ),
    (DIGITS + " --config.profile.first_step=9 --config.steps=9 --config.data.dir={old}/data", "than the run's 9 steps"),
    # Folders and files.
    ("main.py --config configs/digits.py --workdir {old}/text.jpg", "text.jpg is a file; name a folder"),
    ("main.py --config configs/digits.py --workdir {old}/text.jpg/run", "text.jpg is a file; name a folder"),
    (
        "main.py --config configs/digits.py --workdir ~nobody-of-this-name/run",
        "--workdir=~nobody-of-this-name/run: there is",
    ),
    ("main.py --config configs/digits.py --workdir {new}/" + 300 * "x", "is not a folder path"),
    ("main.py --config configs/digits.py --workdir gs://bucket/run", "--workdir=gs://bucket/run: gs: is not supported"),
    ("main.py --config configs/digits.py --workdir {new}/" + 20 * (240 * "x" + "/"), "is longer than 3,500 bytes"),
    ("main.py --config configs/digits.py --workdir {new}/\udcff", "is not valid UTF-8; rename it or give another path"),
    ("main.py --config configs/digits.py --workdir {old}/orphan", "has checkpoints but no config.json"),
    ("main.py --config configs/digits.py --workdir {old}/foreign", "has results.json but no config.json"),
    (OLD + "/deep", "config.json cannot be read (it is nested too deeply)"),
    (DIGITS + " --flagfile={new}/none.txt", "none.txt"),
    ("main.py --config configs/digits.py --workdir {old}/torn", "config.json cannot be read"),
    ("main.py --config configs/digits.py --workdir {old}/list", "config.json cannot be read"),
    (OLD + "/run --config.seed=4", "holds another run: its config.seed is 3407, now 4"),
    (OLD + "/damaged_results", "results.json cannot be read"),
    (EVALUATE + " --workdir {old}/damaged_checkpoint", "checkpoint"),
    (EVALUATE + " --workdir {old}/lost_checkpoint", "checkpoint"),
    (INIT_FROM + "={old}/empty", "/empty holds no checkpoint; train there first with --config, or"),
    (INIT_FROM + "={old}/torn", "the file is damaged"),
    (INIT_FROM + "={old}/lost_dataset", "dataset.json cannot be read"),
    (INIT_FROM + "={old}/run", "holds another model: its config.model.name is 'simplest_vit', here 'isometric_vit'"),
    (INIT_FROM + "=3", "config.init_from"),
    ("main.py predict --workdir {old}/run --images {old}/text.jpg", "text.jpg: not a complete image"),
    (
        "main.py predict --workdir {old}/run --images {old}/text.jpg --csv={new}/no/a.csv",
        "no/a.csv cannot be written; expected a",
    ),
    ("main.py predict --workdir {old}/run --images {old}/cut.jpg {old}/empty", "has no images"),
    (DIGITS + " --config.data.dir={old}/text.jpg", "text.jpg: cannot prepare digits there"),
    (DIGITS + " --config.data.dir={old}/tfrecord", "prepared as tfrecord, expected array_record"),
    (DIGITS + " --config.data.dir={old}/torn_data", "torn_data"),
    (CIFAR + " --config.data.manual_dir={new}/nowhere", "no such folder; give the folder with the original files"),
    (CIFAR + " --config.data.manual_dir={old}/empty", "an empty folder; give the folder with the original files"),
    (CIFAR + " --config.data.manual_dir={old}/cifar", "batches.meta.txt: 9 class names, expected 10"),
    (CIFAR + " --config.model.patch_size=5", "does not divide the image size 32 x 32"),
    (CIFAR + " --config.data.name=image_folder", "folder with your images: --config.data.manual_dir=FOLDER"),
    (
        CIFAR + " --config.data.name=image_folder --config.data.manual_dir={old}/zips",
        "expected CLASS/*.jpg in it",
    ),
    (CIFAR + " --config.data.name=image_folder --config.data.manual_dir={old}/photos", "unreadable images, listed"),
    (CIFAR + " --config.data.name=tiny_imagenet --config.data.manual_dir={old}/zips", "not a complete zip file"),
    (CIFAR + " --config.data.name=imagenet --config.data.manual_dir={old}/zips", "ILSVRC2012_img_train.tar"),
    # The other programs.
    ("simplest_vit", "a command is missing; expected one of train, evaluate, "),
    ("simplest_vit trian", "command 'trian' is unknown; expected one of train, "),
    ("simplest_vit train", "--workdir is missing; usage: simplest-vit train --config"),
    ("simplest_vit train --config configs/digits.py --workdir {new}/run --mode=train", "flag 'mode'"),
    ("simplest_vit train --config configs/digits.py --workdir {new}/run more", "unexpected argument 'more'"),
    ("simplest_vit evaluate --config configs/digits.py --workdir {new}/run --json", "Unknown command line flag 'json'"),
    ("simplest_vit predict --config configs/digits.py --workdir {new}/run", "--config is not a flag of this command"),
    (PREPARE, "0 data sets given, expected one of digits, "),
    (PREPARE + " digits cifar10", "2 data sets given, expected one of digits, "),
    (PREPARE + " mnist", "error: NAME=mnist: no such data set in"),
    (PREPARE + " digits --force", "Unknown command line flag 'force'"),
    (PREPARE + " digits --data_dir={old}/text.jpg", "cannot prepare digits there"),
    (PREPARE + " digits --data_dir=~nobody-of-this-name/x", "there is no such user; give another path"),
    (PREPARE + " cifar10 --data_dir={new}/data --manual_dir={new}/nowhere", "no such folder"),
    (PREPARE + " image_folder --data_dir={new}/data", "folder with your images: --manual_dir=FOLDER"),
    (PREPARE + " image_folder --data_dir={new}/data --manual_dir={old}/hollow", "a class folder without images"),
    ("simplest_vit preview", "--config is missing"),
    (PREVIEW + " --output={new}/no/x.png", "x.png cannot be written; expected"),
    (PREVIEW + " --output={new}.psd", ".psd cannot be written; expected"),
    (PREVIEW + " --output={old}/folder.png", "(Is a directory)"),
    (PREVIEW + " --config.data.label=x", "config.data.label=x: "),
    (PREVIEW + " --workdir {new}/run", "--workdir is not a flag of this command"),
    (PREPARE + " digits --config configs/digits.py", "--config is not a flag of this command"),
    (
        "simplest_vit preview --config configs/digits.py --config.data.crop_padding=-1",
        "config.data.crop_padding=-1",
    ),
    (SWEEP + " --workdir {new}/run --grid config.depth=3", "no field 'depth' to vary"),
    (SWEEP + " --workdir {new}/run --grid seed", "expected config.FIELD=VALUE,VALUE"),
    (SWEEP + " --workdir {new}/run --seeds 0", "--seeds=0"),
    (SWEEP + " --workdir {new}/run --config.seed 4294967295 --seeds 2", "--seeds=2: the last seed is 4294967296"),
    (
        SWEEP + " --workdir {new}/run --grid config.model.depth=12,-3",
        "at config.model.depth=-3: config.model.depth=-3 m",
    ),
    (
        SWEEP + " --workdir {new}/run --grid config.epochs=3,x",
        "--grid: at config.epochs=x: config.epochs=x must be a number",
    ),
    (SWEEP + " --workdir {new}/run --grid config.optimizer.name=muon,adam", "config.optimizer.name=adam: config.optim"),
    (SWEEP + " --workdir {new}/run --config.epochs=0", "config.epochs=0.0 must be"),
    (SWEEP + " --workdir {old}/text.jpg", "text.jpg is a file"),
    (SWEEP + " --workdir {old}/run", "is the folder of a run; a sweep needs its own folder"),
    ("simplest_vit report", "no folder given; usage: "),
    ("simplest_vit report {new}/nowhere", "nowhere is not a folder"),
    ("benchmarks.reproduce nothing --workdir {new}/run", "unknown table nothing; usage: "),
    ("benchmarks.reproduce headline", "--workdir is missing"),
    ("simplest_vit signal_propagation --config configs/digits.py --workdir {new}/run --seeds=0", "--seeds=0"),
    (
        "simplest_vit signal_propagation --config digits --workdir {new}/run --seeds=2 --config.seed=4294967295",
        "--seeds=2: the last seed is 4294967296",
    ),
    (IMPORT, "--checkpoint is missing"),
    (IMPORT + " --checkpoint={new}/x.pth", "x.pth cannot be read"),
    (IMPORT + " --checkpoint={old}/text.jpg", "text.jpg"),
    (IMPORT + " --checkpoint={old}/text.jpg --config.data.image_size=-5", "config.data.image_size=-5 must be"),
    ("simplest_vit export --workdir {new}/run --format=stablehlo", "--output is missing"),
    ("benchmarks.records {new}/nowhere", "nowhere is not a folder"),
    ("benchmarks.checkpoint --config configs/digits.py --config.batch_size=0", "config.batch_size=0 must be"),
    ("benchmarks.train_step --config configs/digits.py --config.model.depth=0", "config.model.depth=0 must be"),
    ("benchmarks.checkpoint --config configs/digits.py --record=x", "--record=x: expected --record=TABLE:ROW"),
    ("benchmarks.checkpoint --config configs/digits.py", "config.checkpoint_every=30 epochs: fake data have no epochs"),
    (
        "benchmarks.train_step --config configs/digits.py --config.model.attention_kernel=fused",
        "needs NVIDIA GPUs",
    ),
    (
        "benchmarks.train_step --config configs/digits.py --against {new}/x.py",
        "x.py: there is no such file; expected",
    ),
    ("benchmarks.train_step --config configs/digits.py --against configs/digits.py --against.seed=-1", "seed=-1 must"),
    ("benchmarks.optimizers --config configs/digits.py --measured_batch_size=0", "--measured_batch_size=0"),
    ("benchmarks.input_pipeline mnist", "data.name=mnist: no such data set"),
]

# (command, variables, modules that are not installed, expected)
ENVIRONMENT = [
    (DIGITS + " --config.data.dir={old}/data", {"JAX_PLATFORMS": "nonsense"}, (), "JAX_PLATFORMS=nonsense: Unable to"),
    (DIGITS + " --config.data.dir={old}/data", {"JAX_PLATFORMS": "rocm"}, (), "JAX_PLATFORMS=rocm: "),
    (DIGITS, {"HOME": "{old}/text.jpg"}, (), "tensorflow_datasets: cannot prepare digits there"),
    ("main.py --config configs/digits.py --workdir ~/run", {"HOME": "{old}/text.jpg"}, (), "text.jpg is a file"),
    # Shells leave `~` after an equals sign to the commands.
    *(
        (command + name, {"HOME": "{old}"}, (), f"/old0/{name}")
        for command, name in (
            (SWEEP + " --workdir=~/", "run"),
            ("simplest_vit report ~/", "nowhere"),
            ("simplest_vit predict --workdir=~/run --images=~/", "text.jpg"),
            ("simplest_vit predict --workdir=~/run --images=~/photos --csv=~/", "empty"),
            ("simplest_vit export --workdir=~/run --format=stablehlo --output=~/", "text.jpg"),
            (EVALUATE + " --workdir=~/run --image_folder=~/", "empty"),
            (EVALUATE + " --workdir=~/run --output=~/", "text.jpg"),
            (PREVIEW + " --output=~/", "folder.png"),
            (PREPARE + " digits --data_dir=~/", "text.jpg"),
            (PREPARE + " image_folder --data_dir={new}/data --manual_dir=~/", "hollow"),
            (IMPORT + " --checkpoint=~/", "text.jpg"),
        )
    ),
    (DIGITS, {}, ("orbax",), "pip install -r requirements.txt"),
    (PREPARE + " digits", {}, ("ml_collections",), 'pip install "simplest-vit[train]"'),
    (DIGITS, {}, ("tensorflow_datasets",), "import of tensorflow_datasets halted"),
    (DIGITS + " --config.wandb=mine", {}, ("wandb",), "config.wandb needs Weights & Biases; install it: pip install"),
]

# Real processes, each with its own imports, which take seconds: started together.
PROCESSES = [
    (DIGITS + " --config.batch_size=none", "config.batch_size=none must be an integer"),
    ("-m " + SWEEP + " --workdir {new}/run --grid x", "--grid=x: expected config.FIELD"),
    ("-m benchmarks.train_step --config configs/digits.py --config.seed=-1", "config.seed=-1 must be"),
]

ANY_FIELD = """
from math import inf, nan
from configs import digits

def get_config(arguments):
    optimizer, _, assignment = arguments.partition(";")
    config = section = digits.get_config(f"model=simplest_vit,optimizer={optimizer}")
    path, _, value = assignment.partition("=")
    *sections, last = path.split(".")
    for name in sections:
        section = section[name]
    with section.unlocked(), section.ignore_type():
        if value == "missing":
            del section[last]
        else:
            section[last] = eval(value)
    return config
"""

TINY = """
from tests.tiny import tiny_config

def get_config():
    return tiny_config(steps=1, eval_every=1, checkpoint_every=1, log_every=1, data__dir={data!r})
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory, server):
    """A folder with config files, damaged files, data sets and runs."""
    old = tmp_path_factory.mktemp("old")
    (old / "any_field.py").write_text(ANY_FIELD)
    (old / "tiny.py").write_text(TINY.format(data=str(old / "data")))
    for name, (text, _) in CONFIGS.items():
        (old / name).write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    (old / "cut.jpg").write_bytes(jpeg[:-400])
    (old / "text.jpg").write_text("no image")
    (old / "folder.png").mkdir()
    for name in (
        "empty",
        "orphan/checkpoints",
        "torn",
        "list",
        "deep",
        "foreign",
        "cifar/cifar-10-batches-bin",
        "zips",
    ):
        (old / name).mkdir(parents=True)
    (old / "torn/config.json").write_text('{"seed": 3')
    (old / "list/config.json").write_text("[]")
    (old / "deep/config.json").write_text(100_000 * "[")
    (old / "foreign/results.json").write_text("{}")
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (old / f"cifar/cifar-10-batches-bin/{name}.bin").write_bytes(b"")
    (old / "cifar/cifar-10-batches-bin/batches.meta.txt").write_text("\n".join("abcdefghi"))
    (old / "zips/tiny-imagenet-200.zip").write_bytes(b"PK no zip")
    for folder, content in (("photos", jpeg[:-400]), ("hollow", None)):
        for split in ("train", "val"):
            (old / folder / split / "cat").mkdir(parents=True)
            if content is not None or split == "train":
                (old / folder / split / "cat" / "good.jpg").write_bytes(jpeg)
        if content is not None:
            (old / folder / "train" / "cat" / "cut.jpg").write_bytes(content)

    data = pathlib.Path(prepare("digits", old / "data").folder).relative_to(old / "data")
    shutil.copytree(old / "data", old / "tfrecord")
    for path in (old / "tfrecord" / data).glob("*.array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    info = old / "tfrecord" / data / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    shutil.copytree(old / "data", old / "torn_data")
    (old / "torn_data" / data / "dataset_info.json").write_text("{")

    program = ["simplest_vit", "import_reference", "--config", old / "tiny.py", "--workdir", old / "run"]
    code, _, error = server.run([*program, "--checkpoint", ROOT / "tests/interop/fixtures/simplest_vit.pth"])
    assert code == 0, error
    for name in (
        *("damaged_results", "damaged_checkpoint", "lost_checkpoint"),
        *("old_version", "damaged_dataset", "lost_dataset"),
    ):
        shutil.copytree(old / "run", old / name)
    config = json.loads((old / "run/config.json").read_text())["config"]
    (old / "old_version/config.json").write_text(json.dumps(config))
    (old / "damaged_dataset/dataset.json").write_text("{}")
    (old / "lost_dataset/dataset.json").unlink()
    (old / "damaged_results/results.json").write_text("{")
    for path in (old / "damaged_checkpoint/checkpoints/1/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    shutil.rmtree(old / "lost_checkpoint/checkpoints/1")
    return old


def content(*folders):
    """Every file with what is in it; preparing may leave empty folders behind."""
    return {str(path): hash(path.read_bytes()) for folder in folders for path in folder.rglob("*") if path.is_file()}


def place(text, new, old):
    return text.replace("{new}", str(new)).replace("{old}", str(old))


def check(code, error, expected):
    assert code == 2, error
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if not LOG.match(line)]
    assert line.startswith("error: ")
    assert expected in line


@pytest.fixture(scope="module")
def before(old):
    return content(old)


@pytest.fixture
def mistake(server, old, before, tmp_path):
    """Run a command line and check how it ends, and that it leaves nothing behind."""

    def run(command, expected, environment=None, missing=()):
        environment = {"HOME": "{new}/home", "MPLCONFIGDIR": "{old}/.."} | (environment or {})
        environment = {name: place(value, tmp_path, old) for name, value in environment.items()}
        words = [place(word, tmp_path, old) for word in command.split(" ")] if isinstance(command, str) else command
        code, _, error = server.run(words, environment, missing)
        check(code, error, expected)
        assert content(tmp_path, old) == before
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize(("optimizer", "field", "value", "expected"), FIELDS)
def test_fields(mistake, old, tmp_path, optimizer, field, value, expected):
    config = f"{old}/any_field.py:{optimizer};{field}={value}"
    mistake(["main.py", "--config", config, "--workdir", tmp_path / "run"], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(mistake, name):
    mistake(f"main.py --config {{old}}/{name} --workdir {{new}}/run", CONFIGS[name][1])


@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_commands(mistake, command, expected):
    mistake(command, expected)


@pytest.mark.parametrize(("command", "variables", "missing", "expected"), ENVIRONMENT)
def test_environment(mistake, command, variables, missing, expected):
    mistake(command, expected, variables, missing)


def test_processes(old, before, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path / "home"), "MPLCONFIGDIR": str(old.parent), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, *place(command, tmp_path, old).split(" ")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, _ in PROCESSES
    ]
    for process, (_, expected) in zip(started, PROCESSES, strict=True):
        _, error = process.communicate(timeout=120)
        check(process.returncode, error, expected)
    assert content(tmp_path, old) == before
    assert not (tmp_path / "run").exists()
