"""Training by the reference's settings beside plain PyTorch: same weights, same batches, the same losses."""

import os

import numpy as np
import pytest

from simplest_vit.data import input_pipeline
from simplest_vit.training.run import build
from tests.tiny import tiny_config

REFERENCE = {
    "model__attention": "espa_reference",
    "model__init": "reference",
    "label_smoothing": 0.1,
    "weight_decay": 5e-5,
}


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adam", {"optimizer__learning_rate": 1e-3}),
        # Roots are new at steps 5, 10, 15, and used from step 6 on. At the reference's epsilon, 1e-12, they are made of
        # eigenvalues that are float32's rounding, which no two programs share.
        (
            "reference_shampoo",
            {
                "optimizer__learning_rate": 1e-3,
                "optimizer__precondition_frequency": 5,
                "optimizer__start_preconditioning_step": 5,
                "optimizer__eps": 1e-6,
                "optimizer__max_preconditioner_dim": 256,  # kernels of 16 x 16 are merged, those of 16 x 32 are not
            },
        ),
    ],
)
def test_losses_are_those_of_plain_pytorch(data_dir, optimizer, settings):
    if not os.environ.get("SIMPLEST_VIT_REQUIRE_TORCH"):
        pytest.importorskip("torch")
    from tests.torch_training import losses_side_by_side

    config = tiny_config(
        f"optimizer={optimizer}", steps=40, warmup_steps=5, data__dir=data_dir, **REFERENCE, **settings
    )
    dataset = input_pipeline.load(config.data)
    ours, theirs = losses_side_by_side(build(config, dataset.info), dataset, 16)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1] < 0.97 * ours[0], "nothing was learned, so nothing was compared"
