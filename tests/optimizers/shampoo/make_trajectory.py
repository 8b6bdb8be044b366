"""Makes `fixtures/trajectory.npz`: parameters as the original PyTorch Shampoo steps them, in float64.

    python -m tests.optimizers.shampoo.make_trajectory SimplEsT-ViT

The argument is a checkout of github.com/richardcepka/SimplEsT-ViT (made with commit dfc1c0a, PyTorch 2.13).
"""

import pathlib
import sys

import numpy as np

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "trajectory.npz"
SHAPES = {"matrix": (12, 8), "bias": (7,), "conv": (6, 3, 2, 2)}
STEPS = 40
RECORDED = (1, 10, 11, 40)  # Adam's first and last step, the first of Shampoo, the last of all
CASES = {"": 8192, "blocks of 5, ": 5}  # prefix of the names in the fixture -> max_preconditioner_dim


def initial_and_noise():
    """The parameters at the start, and for each step what is added to 0.1 x the parameters to make a gradient."""
    rng = np.random.RandomState(0)  # whose numbers NumPy promises to keep
    draw = lambda: {name: rng.normal(size=shape) for name, shape in SHAPES.items()}  # noqa: E731
    return draw(), [draw() for _ in range(STEPS)]


def main(checkout: str) -> None:
    import torch

    sys.path.insert(0, checkout)
    from shampoo.shampoo import Shampoo
    from shampoo.shampoo_utils import GraftingType

    initial, noise = initial_and_noise()
    history = {}
    for case, max_dim in CASES.items():
        params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in initial.items()}
        optimizer = Shampoo(
            params.values(),
            lr=1e-2,
            betas=(0.9, 0.999),
            epsilon=1e-12,
            weight_decay=0.0,
            max_preconditioner_dim=max_dim,
            precondition_frequency=5,
            start_preconditioning_step=10,
            use_decoupled_weight_decay=False,
            use_merge_dims=False,
            preconditioner_dtype=torch.float64,
            grafting_type=GraftingType.ADAM,
            grafting_epsilon=1e-8,
            grafting_beta2=0.999,
        )
        for name in SHAPES:
            history[case + name] = []
        for t, step in enumerate(noise, 1):
            for name, param in params.items():
                param.grad = (0.1 * param + torch.tensor(step[name])).detach()
            optimizer.step()
            for name, param in params.items() if t in RECORDED else ():
                history[case + name].append(param.detach().numpy().copy())
    FIXTURE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURE, **{name: np.stack(values) for name, values in history.items()})


if __name__ == "__main__":
    main(sys.argv[1])
