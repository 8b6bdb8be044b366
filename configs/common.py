"""The choices of network, optimizer and augmentation that most recipes share."""

from ml_collections import ConfigDict

from simplest_vit.config import default, parse_arguments

# The reference's peak learning rates for SimplEsT-ViT-S with Adam and Shampoo; SOAP's is that of the runs in
# results/runs.csv, and Muon's was not tuned.
LEARNING_RATES = {"adam": 5e-4, "muon": 1e-2, "shampoo": 7e-4, "reference_shampoo": 7e-4, "soap": 1e-3}
SIMPLE_VIT_ADAM = 1e-3
# Without normalization, SOAP starts with steps of Adam: RESULTS.md, "The first steps of SOAP".
SOAP_START = 10


def start(arguments: str | None) -> ConfigDict:
    """Create a config with the network, the optimizer and the augmentation that the arguments choose.

    Args:
      arguments: `model=simplest_vit|isometric_vit|shift_mlp|simple_vit`, `optimizer=NAME` (adam, muon, shampoo, soap or
        any other optax optimizer, which keeps the default learning rate), `augmentation=basic|strong` (label smoothing,
        or mixup and RandAugment; both crop and flip).

    Returns:
      The config, which a recipe completes.
    """
    choice = parse_arguments(
        arguments,
        augmentation=("basic", "strong"),
        model=("simplest_vit", "isometric_vit", "shift_mlp", "simple_vit"),
        optimizer="adam",
    )
    config = default(choice["optimizer"])
    config.model.name = choice["model"]
    config.optimizer.learning_rate = LEARNING_RATES.get(choice["optimizer"], config.optimizer.learning_rate)
    if (choice["model"], choice["optimizer"]) == ("simple_vit", "adam"):
        config.optimizer.learning_rate = SIMPLE_VIT_ADAM
    if choice["optimizer"] == "soap" and choice["model"] != "simple_vit":
        config.optimizer.start_preconditioning_step = SOAP_START
    if choice["augmentation"] == "basic":
        config.label_smoothing = 0.1
    else:
        config.data.mixup_alpha = 0.2
        config.data.rand_augment.num_ops = 2
    return config
