"""What the recipes for CIFAR, TinyImageNet and ImageNet share: the reference's setups and learning rates."""

from ml_collections import ConfigDict

from simplest_vit.config import default, parse_arguments

# Peak learning rates for SimplEsT-ViT-S of the reference's recipe; Muon and SOAP are not in it.
LEARNING_RATES = {"adam": 5e-4, "muon": 1e-2, "shampoo": 7e-4, "soap": 7e-4}
SIMPLE_VIT_ADAM = 1e-3


def small_data(arguments: str | None) -> ConfigDict:
    """The reference's recipe for CIFAR-10/100 and TinyImageNet-200: 90 epochs of batches of 2048.

    Args:
      arguments: `augmentation=basic|strong`, `model=simplest_vit|isometric_vit|shift_mlp|simple_vit`,
        `optimizer=adam|...`.

    Returns:
      The config.
    """
    choice = parse_arguments(
        arguments,
        augmentation=("basic", "strong"),
        model=("simplest_vit", "isometric_vit", "shift_mlp", "simple_vit"),
        optimizer=tuple(LEARNING_RATES),
    )
    config = default(choice["optimizer"])
    config.model.name = choice["model"]
    config.weight_decay = 5e-5
    config.optimizer.learning_rate = LEARNING_RATES[choice["optimizer"]]
    if (choice["model"], choice["optimizer"]) == ("simple_vit", "adam"):
        config.optimizer.learning_rate = SIMPLE_VIT_ADAM
    if choice["optimizer"] == "shampoo":
        config.optimizer.precondition_frequency = 25
    if choice["augmentation"] == "basic":
        config.label_smoothing = 0.1
    else:
        config.data.mixup_alpha = 0.2
        config.data.rand_augment.num_ops = 2
    return config
