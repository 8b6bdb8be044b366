"""The protocols of the results: how runs are made, their networks, and the tables made from them.

`benchmarks.reproduce` runs a table, `benchmarks.records` keeps its runs, `benchmarks.results_page` prints it.
"""

import importlib
from typing import Any, NamedTuple

from benchmarks.ideas import KINDS

# Protocol -> fields that differ from the data set's recipe. `small` takes nine minutes on one core: 12 blocks of width
# 64, batches of 64, 1,500 steps (1.9 epochs of CIFAR).
SMALL = {
    "batch_size": 64,
    "warmup_steps": 75,
    "compute_dtype": "float32",
    "model.width": 64,
    "model.num_heads": 2,
    "model.mlp_dim": 256,
}
PROTOCOLS: dict[str, dict[str, Any]] = {"small": SMALL, "recipe": {}}

# Choices are made on images that are used neither for training nor for reported results.
HOLD_OUT = {"data.train_split": "train[:45000]", "data.validation_split": "train[45000:]"}
CHOOSING_EPOCHS = 30
FRESH_SEEDS = (11, 12, 13, 14, 15)


class Network(NamedTuple):
    """A row of a table.

    Attributes:
      preset: `config.model.name`.
      fields: Fields that differ from the preset and the protocol.
      learning_rates: Rates to choose from, in place of the table's.
    """

    preset: str
    fields: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    learning_rates: tuple[float, ...] = ()


class Table(NamedTuple):
    """Runs that belong together.

    Attributes:
      title: Subject of the table.
      rows: Names in `NETWORKS`.
      learning_rates: Rates to choose from, by optimizer.
      data: Data sets.
      protocol: One of `PROTOCOLS`.
      steps: Steps of every run, also to choose a rate: the best rate after 500 steps is too high for 1,500. None for
        the recipe's epochs.
      seeds: Seeds of the runs on the test images. If empty, the table itself is made on the hold-out.
      choosing_seeds: Seeds of the runs on the hold-out.
      steps_of: Steps of single rows, in place of `steps`.
      augmentation: `basic` or `strong`, as in the recipes.
    """

    title: str
    rows: tuple[str, ...]
    learning_rates: dict[str, tuple[float, ...]]
    data: tuple[str, ...] = ("cifar10",)
    protocol: str = "small"
    steps: int | None = 1500
    seeds: tuple[int, ...] = FRESH_SEEDS
    choosing_seeds: tuple[int, ...] = (1,)
    steps_of: dict[str, int] = {}  # noqa: RUF012 (never changed)
    augmentation: str = "basic"

    def row_steps(self, row: str) -> int | None:
        """Return the steps of a row's runs; None for the recipe's epochs."""
        return self.steps_of.get(row, self.steps)


_EIGHT = {"model.num_heads": 8}


def _isometric(**fields: Any) -> Network:
    return Network("isometric_vit", _EIGHT | {f"model.{name}": value for name, value in fields.items()})


NETWORKS: dict[str, Network] = {
    "isometric": _isometric(),
    "SimpleViT": Network("simple_vit"),
    "E-SPA + TAT": Network("simplest_vit"),
    "E-SPA + TAT, reference": Network("simplest_vit", {"model.attention": "espa_reference", "model.init": "reference"}),
    # Constant shifts of the tokens themselves: no queries, keys and values.
    "shift MLP": Network("shift_mlp", _EIGHT),
    # Frozen attention: the same shifts of values, without queries and keys.
    "isometric, attention frozen": _isometric(attention="fixed_shift"),
    "SimpleViT, constant shifts": Network(
        "simple_vit", _EIGHT | {"model.attention": "fixed_shift", "model.init": "orthogonal"}
    ),
    "SimpleViT, shifts": Network("simple_vit", _EIGHT | {"model.attention": "shift", "model.init": "orthogonal"}),
    # Add-back: what the isometric network leaves out.
    "isometric + LayerNorm": _isometric(norm="layer_norm"),
    "isometric + skip": _isometric(skip="residual"),
    "isometric + scaled skip": _isometric(skip="scaled"),
    "isometric + LayerNorm + skip": _isometric(norm="layer_norm", skip="residual"),
    "isometric + LayerNorm + scaled skip": _isometric(norm="layer_norm", skip="scaled"),
    # A stronger baseline.
    "SimpleViT, orthogonal": Network("simple_vit", {"model.init": "orthogonal"}),
    "SimpleViT, mimetic": Network("simple_vit", {"model.init": "mimetic"}),
    "SimpleViT, warm-up 200": Network("simple_vit", {"warmup_steps": 200}),
    "SimpleViT, no clipping": Network("simple_vit", {"grad_clip": 0.0}),
    # The number of heads determines the time of a step.
    "isometric, 2 heads": Network("isometric_vit"),
    "isometric, 4 heads": _isometric(num_heads=4),
    "SimpleViT, 4 heads": Network("simple_vit", {"model.num_heads": 4}),
    "SimpleViT, 8 heads": Network("simple_vit", _EIGHT),
    # One thing replaced.
    "isometric, 1 of 8 heads in place": _isometric(identity_head_fraction=0.125),
    "isometric, 4 of 8 heads in place": _isometric(identity_head_fraction=0.5),
    "isometric, 7 of 8 heads in place": _isometric(identity_head_fraction=0.875),
    "isometric, all heads in place": _isometric(identity_head_fraction=1.0),
    "isometric, ReLU": _isometric(activation="relu"),
    "isometric, Gaussian values": _isometric(init="espa_tat"),
    "E-SPA + looks-linear": _isometric(attention="espa"),
    "E-SPA (gamma 0.1) + looks-linear": _isometric(attention="espa", gamma_max_depth=0.1),
    "E-SPA 2-D + looks-linear": _isometric(attention="espa_2d"),
    "shift + TAT (eta 0.9)": _isometric(mlp="tat", activation="tailored_relu"),
    "shift + TAT (eta 0.5)": _isometric(mlp="tat", activation="tailored_relu", c_val_0_target=0.5),
    "Value-SkipInit + looks-linear": _isometric(attention="value_skipinit"),
}
NETWORKS |= {
    f"isometric, uniform fraction {fraction:g}": _isometric(uniform_fraction=fraction)
    for fraction in (0.002, 0.05, 0.1, 0.2, 0.5)
}
NETWORKS |= {f"isometric, {kind}": _isometric(attention=kind) for kind in KINDS if kind != "four_shifts_beside_softmax"}
# Fewer heads of softmax make a step cheaper; two are the protocol's.
NETWORKS |= {
    "isometric, shift_beside_softmax, 4 heads": _isometric(attention="shift_beside_softmax", num_heads=4),
    **{
        f"isometric, {kind}, 2 heads": Network("isometric_vit", {"model.attention": kind})
        for kind in ("shift_beside_softmax", "four_shifts_beside_softmax")
    },
}
NETWORKS |= {
    f"{row}, {blocks} blocks": NETWORKS[row]._replace(
        fields=NETWORKS[row].fields | {"model.depth": blocks}, learning_rates=rates
    )
    for blocks, of_deep, of_skips in ((24, (5e-4, 1e-3, 2e-3), (4e-3, 8e-3)), (64, (4e-4, 8e-4, 1.6e-3), (2e-3, 4e-3)))
    for row, rates in (
        ("isometric", of_deep),
        ("isometric, attention frozen", of_deep),
        ("shift MLP", of_deep),
        ("E-SPA + TAT", of_deep),
        ("SimpleViT", of_skips),
    )
}
# At the default fraction, 0.01, half of the difference between tokens is lost in 64 blocks.
NETWORKS["isometric, 64 blocks, uniform fraction 0.002"] = NETWORKS["isometric, 64 blocks"]._replace(
    fields=_isometric(depth=64, uniform_fraction=0.002).fields
)
NETWORKS |= {
    f"{row}, width 128": NETWORKS[row]._replace(
        fields=NETWORKS[row].fields | {"model.width": 128, "model.mlp_dim": 512, "model.num_heads": heads}
    )
    for row, heads in (("isometric", 8), ("isometric, attention frozen", 8), ("shift MLP", 8), ("SimpleViT", 4))
}
_ADD_BACK = tuple(row for row in NETWORKS if row.startswith("isometric + "))
# The recipes start SOAP with ten steps of Adam, except for SimpleViT; these rows do the opposite.
AT_ONCE, AFTER_ADAM = ", SOAP from step 1", ", SOAP from step 11"
NETWORKS |= {
    row + suffix: NETWORKS[row]._replace(fields=NETWORKS[row].fields | {"optimizer.start_preconditioning_step": start})
    for rows, suffix, start in (
        (("isometric", "isometric, attention frozen", *_ADD_BACK), AT_ONCE, 0),
        (("SimpleViT",), AFTER_ADAM, 10),
    )
    for row in rows
}
# At the sizes of the recipe (S: six heads) nothing differs from the preset.
RECIPE_NETWORKS = {
    "isometric": Network("isometric_vit"),
    "shift MLP": Network("shift_mlp"),
    "SimpleViT": Network("simple_vit"),
    "E-SPA + TAT": Network("simplest_vit"),
}

# Ideas other than those of the table `attention`: kinds without values or with late attention, a pull, and Adam.
_IDEAS = tuple(f"isometric, shift_{kind}" for kind in ("late", "last_quarter", "without_values"))
_PULLED = tuple(f"isometric, pull {pull}" for pull in (1, 10))
NETWORKS |= {row: Network("isometric_vit", _EIGHT | {"optimizer.pull": float(row.split()[-1])}) for row in _PULLED}
_SHORTER = {"b2 0.95": {"optimizer.b2": 0.95}}
_SHORTER["b2 0.95, no clipping, warm-up 200"] = _SHORTER["b2 0.95"] | {"grad_clip": 0.0, "warmup_steps": 200}
_ADAM = {
    f"{row}, {change}": NETWORKS[row]._replace(fields=NETWORKS[row].fields | fields)
    for row in ("isometric", "SimpleViT")
    for change, fields in _SHORTER.items()
}
NETWORKS |= _ADAM

# The steps that take as long as 1,500 of SimpleViT: benchmarks/README.md has the times of alternating steps.
_EQUAL_TIME = {
    "shift MLP": 2700,
    "isometric, attention frozen": 2700,
    "isometric, 4 heads": 1700,
    "SimpleViT, constant shifts": 1900,
}
_DEEP_EQUAL_TIME = {"shift MLP, 64 blocks": 900}

# Tables of ideas, which are compared on the hold-out alone.
_THREE_SEEDS: dict[str, Any] = {"steps": 500, "seeds": (), "choosing_seeds": (1, 2, 3)}
_SOAP: dict[str, tuple[float, ...]] = {"soap": (1e-3, 2e-3, 4e-3, 8e-3)}
_REPLACED = tuple(row for row in NETWORKS if "looks-linear" in row or " in place" in row or "TAT (eta" in row)
TABLES: dict[str, Table] = {
    "headline": Table(
        "isometric network and SimpleViT under three optimizers",
        ("isometric", "isometric, attention frozen", "SimpleViT"),
        _SOAP | {"muon": (2e-3, 4e-3, 8e-3, 1.6e-2), "adam": (2.5e-4, 5e-4, 1e-3, 2e-3)},
        ("cifar10", "cifar100"),
    ),
    "controls": Table(
        "norm and skip put back, attention frozen",
        (
            *("isometric", *_ADD_BACK, "isometric, attention frozen"),
            *("SimpleViT", "SimpleViT, constant shifts", "SimpleViT, shifts"),
        ),
        _SOAP,
        ("cifar10", "cifar100"),
    ),
    "baseline": Table(
        "what makes SimpleViT stronger",
        (
            *("SimpleViT", "SimpleViT, 4 heads", "SimpleViT, 8 heads", "SimpleViT, shifts"),
            *("SimpleViT, orthogonal", "SimpleViT, mimetic", "SimpleViT, warm-up 200", "SimpleViT, no clipping"),
        ),
        _SOAP,
        steps=500,
        seeds=(),
    ),
    "equal_time": Table(
        "as many steps as take the time of 1,500 of SimpleViT",
        ("SimpleViT", *_EQUAL_TIME),
        _SOAP,
        ("cifar10", "cifar100"),
        steps_of=_EQUAL_TIME,
    ),
    "heads": Table(
        "number of heads",
        (
            *("isometric, 2 heads", "isometric, 4 heads", "isometric"),
            *("SimpleViT", "SimpleViT, 4 heads", "SimpleViT, 8 heads"),
        ),
        _SOAP,
        steps=500,
        seeds=(),
    ),
    "ablation": Table("one thing replaced", ("isometric", *_REPLACED, "isometric, ReLU"), _SOAP, steps=500, seeds=()),
    "attention": Table(
        "whether attention gains anything: more uniform heads, and other ways to let queries act",
        (
            *("isometric, attention frozen", "isometric"),
            *(row for row in NETWORKS if "isometric, uniform" in row),
            *(row for row in NETWORKS if any(kind in row for kind in KINDS) and row not in _IDEAS),
        ),
        _SOAP,
        steps=500,
        seeds=(),
    ),
    "ideas": Table(
        "no values, and constant shifts in the first blocks",
        ("isometric", "isometric, attention frozen", "shift MLP", *_IDEAS),
        {"soap": (4e-3,)},
        **_THREE_SEEDS,
    ),
    "adam": Table(
        "Adam with a shorter second moment, without clipping, with a longer warm-up, or scaled by a kernel's shape",
        ("isometric", "SimpleViT", *_ADAM),
        {"adam": (1e-3,), "adam_by_shape": (1e-3,)},
        **_THREE_SEEDS,
    ),
    "near_isometry": Table(
        "SOAP whose updates are pulled to isometries",
        _PULLED,
        {"soap_near_isometry": (4e-3,)},
        **_THREE_SEEDS,
    ),
    "start": Table(
        "the first steps of SOAP",
        (
            *(
                "isometric",
                f"isometric{AT_ONCE}",
                "isometric, attention frozen",
                f"isometric, attention frozen{AT_ONCE}",
            ),
            *("SimpleViT", f"SimpleViT{AFTER_ADAM}"),
        ),
        _SOAP,
        seeds=(),
    ),
    "depth": Table("24 and 64 blocks", tuple(row for row in NETWORKS if "blocks" in row), _SOAP, steps=500),
    "depth_equal_time": Table(
        "64 blocks, as many steps as take the time of 500 of SimpleViT",
        ("SimpleViT, 64 blocks", *_DEEP_EQUAL_TIME),
        _SOAP,
        steps=500,
        steps_of=_DEEP_EQUAL_TIME,
    ),
    "long": Table(
        "ten epochs with RandAugment and mixup",
        ("isometric", "shift MLP", "SimpleViT"),
        {"soap": (2e-3, 4e-3)},
        steps=7812,
        seeds=FRESH_SEEDS[:3],
        augmentation="strong",
    ),
    "s4": Table(
        "S/4 by the reference's recipe, for a GPU",
        ("isometric", "shift MLP", "SimpleViT"),
        {"soap": (5e-4, 1e-3, 2e-3, 4e-3)},
        protocol="recipe",
        steps=None,
        seeds=FRESH_SEEDS[:2],
    ),
}


def networks(protocol: str) -> dict[str, Network]:
    """Return the networks of a protocol by the names of their rows."""
    return RECIPE_NETWORKS if protocol == "recipe" else NETWORKS


def recipe_arguments(preset: str, optimizer: str, augmentation: str = "basic") -> str:
    """Return the text after the colon of `--config configs/DATA.py:`."""
    return f"model={preset},optimizer={optimizer},augmentation={augmentation}"


def recipe(data: str, preset: str, optimizer: str, augmentation: str = "basic") -> Any:
    """Return the config that a recipe gives a network and an optimizer."""
    arguments = recipe_arguments(preset, optimizer, augmentation)
    if data == "digits":  # it has one augmentation
        arguments = arguments.rsplit(",", 1)[0]
    return importlib.import_module(f"configs.{data}").get_config(arguments)
