"""What all configs share: every field with its default and meaning, and the arguments of a config file.

A config file is Python and runs when it is named on the command line. `--config configs/cifar10.py:optimizer=shampoo`
sets a choice that changes other values, `--config.batch_size=512` sets one value.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simplest_vit.errors import UserError

OPTIMIZERS = {
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "muon": {
        "beta": 0.95,
        "adam_learning_rate": placeholder(float),
    },  # of what is not a kernel of a block; None: the same
    # None: the preset's value; all are explained in simplest_vit/optimizers/shampoo/options.py.
    "shampoo": {
        "preset": "fast",  # or reference
        "precondition_frequency": 25,  # Shampoo@25
        "start_preconditioning_step": placeholder(int),
        "b1": placeholder(float),
        "b2": placeholder(float),
        "epsilon": placeholder(float),
        "max_preconditioner_dim": placeholder(int),
        "root": placeholder(str),
        "grafting": placeholder(str),
        "stagger": placeholder(bool),
        "shards": placeholder(int),
    },
    "soap": {
        "precondition_frequency": placeholder(int),
        "b1": placeholder(float),
        "b2": placeholder(float),
        "max_preconditioner_dim": placeholder(int),
        "basis": placeholder(str),
        "grafting": placeholder(str),
        "stagger": placeholder(bool),
        "shards": placeholder(int),
    },
}

# Peak learning rates for SimplEsT-ViT-S of the reference's recipe; Muon and SOAP are not in it.
LEARNING_RATES = {"adam": 5e-4, "muon": 1e-2, "shampoo": 7e-4, "soap": 7e-4}
SIMPLE_VIT_ADAM = 1e-3

# Setups of the reference: TAT's (label smoothing) and SimpleViT's (RandAugment and mixup).
SETUPS = ("tat", "simple_vit")


def parse_arguments(arguments: str | None, **choices: tuple[str, ...]) -> dict[str, str]:
    """Read the `key=value,key=value` behind a config file's colon.

    Args:
      arguments: The text, or None.
      **choices: For each key its possible values, the default first.

    Returns:
      A value for each key.

    Raises:
      UserError: On an unknown key or value.
    """
    values = {key: options[0] for key, options in choices.items()}
    for item in filter(None, (arguments or "").split(",")):
        key, _, value = item.partition("=")
        if key not in choices:
            raise UserError(f"config argument {item!r} is unknown; expected key=value with one of {', '.join(choices)}")
        if value not in choices[key]:
            raise UserError(
                f"config argument {key}={value} is unknown; expected {key}= one of {', '.join(choices[key])}"
            )
        values[key] = value
    return values


def optimizer(name: str, learning_rate: float) -> ConfigDict:
    """The section `config.optimizer`: a name, the peak learning rate and that optimizer's own settings."""
    return ConfigDict({"name": name, "learning_rate": learning_rate, **OPTIMIZERS[name]})


def base() -> ConfigDict:
    """Every field but `optimizer`, with the values that all recipes share."""
    config = ConfigDict()
    config.seed = 3407
    config.epochs = 90
    config.steps = placeholder(int)  # overrides epochs
    config.batch_size = 2048
    config.warmup_steps = 75  # linear from 0; then cosine to 0
    config.grad_clip = 1.0  # global norm; 0 turns it off
    config.weight_decay = 0.0  # not on biases, not on LayerNorm
    config.decoupled_weight_decay = False  # False: L2, added to the gradient; True: AdamW's
    config.label_smoothing = 0.0
    config.max_skipped_steps = 10  # in a row, for a loss or gradient that is not finite; then the run stops
    config.fsdp = 1  # devices that share one copy of parameters and optimizer state; 1: each has its own
    config.distributed = placeholder(str)  # auto: several processes, as the cluster says; None: alone, or by flags
    config.accumulation_steps = 1  # micro-batches in a step; the result is that of the whole batch
    config.compute_dtype = "bfloat16"  # of the model; parameters, softmax, logits and loss are float32
    config.eval_every = 240  # steps
    config.checkpoint_every = 240  # steps; a checkpoint is always evaluated
    config.log_every = 24  # steps

    config.sam = ConfigDict({"rho": 0.0, "every": 1})  # rho 0: off; 0.05 is the reference's
    config.ema = ConfigDict({"decay": 0.0, "every": 5})  # decay 0: off; 0.99 is the reference's
    config.profile = ConfigDict({"first_step": 0, "num_steps": 5})  # first_step 0: off

    config.model = ConfigDict()
    config.model.name = "simplest_vit"  # or simple_vit
    config.model.variant = "S"  # Ti, S, B, L: sets the four sizes below where they are None
    config.model.depth = placeholder(int)
    config.model.width = placeholder(int)
    config.model.num_heads = placeholder(int)
    config.model.mlp_dim = placeholder(int)
    config.model.patch_size = 4
    config.model.dropout = 0.0
    config.model.remat = False
    config.model.attention = "espa"  # espa, espa_causal, espa_2d, uspa, espa_reference, value_skipinit, unshaped
    config.model.gamma_max_depth = 0.005  # E-SPA: decay at the last block
    config.model.rho_max_depth = 0.8  # U-SPA: correlation at the last block
    config.model.activation = "tailored_relu"  # or relu
    config.model.c_val_0_target = 0.9  # TAT: eta
    config.model.init = "paper"  # or reference: the PyTorch reference's orthogonal scale

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.dir = placeholder(str)  # prepared data sets; None: ~/tensorflow_datasets
    config.data.manual_dir = placeholder(str)  # folder with the original files, where they are not downloaded
    config.data.label = "fine"  # CIFAR-100: or coarse
    config.data.image_size = placeholder(int)  # None: the images' own
    config.data.random_resized_crop = False  # ImageNet's augmentation; on the host
    config.data.crop_padding = 4  # random crop from the image padded by so many pixels; 0: off
    config.data.flip = True
    config.data.rand_augment = ConfigDict({"num_ops": 0, "magnitude": 10})  # num_ops 0: off; magnitude of 0 to 30
    config.data.mixup_alpha = 0.0  # lambda = min(z, 1 - z), z ~ Beta(alpha, alpha); 0: off
    config.data.cutmix_alpha = 0.0  # likewise; with both, each batch draws one of them
    config.data.mixup_mode = "batch"  # one lambda or box a batch; or example: one for each image
    config.data.device_budget_bytes = 2_000_000_000  # data sets of uint8 images up to this size live on the device
    config.data.num_workers = 0  # processes that decode larger ones; 0: in this process
    return config


def small_data(arguments: str | None) -> ConfigDict:
    """The reference's recipe for CIFAR-10/100 and TinyImageNet-200: 90 epochs of batches of 2048.

    Args:
      arguments: `setup=tat|simple_vit`, `model=simplest_vit|simple_vit`, `optimizer=adam|...`.

    Returns:
      The config.
    """
    choice = parse_arguments(arguments, setup=SETUPS, model=("simplest_vit", "simple_vit"), optimizer=tuple(OPTIMIZERS))
    config = base()
    config.model.name = choice["model"]
    config.weight_decay = 5e-5
    learning_rate = LEARNING_RATES[choice["optimizer"]]
    if (choice["model"], choice["optimizer"]) == ("simple_vit", "adam"):
        learning_rate = SIMPLE_VIT_ADAM
    config.optimizer = optimizer(choice["optimizer"], learning_rate)
    apply_setup(config, choice["setup"])
    return config


def apply_setup(config: ConfigDict, setup: str) -> None:
    """Set the regularization of a setup: label smoothing (`tat`), or mixup and RandAugment (`simple_vit`)."""
    if setup == "tat":
        config.label_smoothing = 0.1
    else:
        config.data.mixup_alpha = 0.2
        config.data.rand_augment.num_ops = 2
