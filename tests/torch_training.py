"""Training in plain PyTorch by the reference's recipe, beside the train step of this project.

Clipping by global norm, coupled weight decay without biases, Adam (PyTorch's own) or Shampoo, warm-up and cosine.
Shampoo is written from the formulas, one block of one tensor at a time; PyTorch's layout is the reference's already.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from simplest_vit.data.input_pipeline import train_batches
from simplest_vit.interop import to_reference
from simplest_vit.models import model_arguments
from simplest_vit.training.run import Run
from simplest_vit.training.state import TrainState
from tests.interop.make_fixtures import reference_name
from tests.torch_reference import ViT, loss


def learning_rate(t: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Of step t, from 1: linear to the peak, then a cosine to 0."""
    if t <= warmup_steps:
        return peak * t / warmup_steps
    return peak * (1 + math.cos(math.pi * (t - warmup_steps) / (total_steps - warmup_steps))) / 2


def clip_(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale gradients whose norm over all parameters is above the limit down to it."""
    gradients = [p.grad for p in parameters]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    for g in gradients:
        g *= min(1.0, limit / norm)


def merged(shape: Iterable[int], limit: int) -> list[int]:
    """Fold each dimension into the one before it while their product is within the limit."""
    first, *others = shape
    result = [first]
    for size in others:
        if result[-1] * size <= limit or 1 in (result[-1], size):
            result[-1] *= size
        else:
            result.append(size)
    return result


class Shampoo(torch.optim.Optimizer):
    """Shampoo@`frequency` grafted onto Adam, as the reference trains with it."""

    def __init__(self, groups, *, frequency, start, max_dim, epsilon, b1=0.9, b2=0.999):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.frequency, self.start, self.max_dim = frequency, start, max_dim
        self.b1, self.b2, self.epsilon = b1, b2, epsilon
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for group in self.param_groups:
            for p in group["params"]:
                gradient = (p.grad + group["weight_decay"] * p).reshape(merged(p.shape, self.max_dim))
                direction = torch.empty_like(gradient)
                cuts = [[slice(i, i + self.max_dim) for i in range(0, n, self.max_dim)] for n in gradient.shape]
                for i, block in enumerate(itertools.product(*cuts)):
                    direction[block] = self.direction(self.state[p].setdefault(i, {}), gradient[block])
                p -= group["lr"] * direction.reshape(p.shape)

    def direction(self, state, g):
        """The direction of one block [m, ...], to subtract."""
        if not state:
            state["m"], state["v"] = torch.zeros_like(g), torch.zeros_like(g)
            state["statistics"] = [self.epsilon * torch.eye(n, dtype=g.dtype) for n in g.shape]
            state["roots"] = [torch.zeros(n, n, dtype=g.dtype) for n in g.shape]
        state["m"] = self.b1 * state["m"] + (1 - self.b1) * g
        state["v"] = 0.999 * state["v"] + 0.001 * g * g
        m = state["m"] / (1 - self.b1**self.t)
        adam = m / (torch.sqrt(state["v"] / (1 - 0.999**self.t)) + 1e-8)
        for axis, n in enumerate(g.shape):
            unfolded = g.movedim(axis, 0).reshape(n, -1)
            state["statistics"][axis] = self.b2 * state["statistics"][axis] + (1 - self.b2) * unfolded @ unfolded.T
        if self.t % self.frequency == 0 and self.t >= self.start:
            correction = 1 - self.b2**self.t
            state["roots"] = [self.root(s / correction, 2 * g.ndim) for s in state["statistics"]]
        if self.t <= self.start:
            return adam
        for axis, root in enumerate(state["roots"]):
            m = torch.tensordot(root, m, ([1], [axis])).movedim(0, axis)
        return m * adam.norm() / (m.norm() + 1e-16)

    def root(self, matrix, p):
        """(A + epsilon I)^(-1/p), negative eigenvalues shifted away first."""
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        eigenvalues = eigenvalues - eigenvalues.min().clamp(max=0) + self.epsilon
        return vectors * eigenvalues ** (-1 / p) @ vectors.T


def peer(run: Run, state: TrainState) -> ViT:
    """The plain model with the weights of a state; its constants are its own."""
    model = run.config.model
    arguments = model_arguments(**model, image_shape=run.data.image_shape)
    names = ("patch_size", "depth", "width", "num_heads", "mlp_dim", "gamma_max_depth", "c_val_0_target")
    vit = ViT(
        model.name,
        image_shape=run.data.image_shape,
        num_classes=run.data.num_classes,
        divide_columns=model.attention == "espa_reference",
        **{name: arguments[name] for name in names},
    )
    weights = to_reference(model, state.params, state.constants)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(torch.tensor(weights[reference_name(model.name, name)]))
    return vit


def create_optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or Shampoo of the config, with weight decay on all that is not a bias."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if not name.endswith("bias")], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named.items() if name.endswith("bias")]},
    ]
    settings = config.optimizer
    if settings.name == "adam":
        return torch.optim.Adam(groups, betas=(settings.b1, settings.b2), eps=settings.eps)
    return Shampoo(
        groups,
        frequency=settings.precondition_frequency,
        start=settings.start_preconditioning_step,
        max_dim=settings.max_preconditioner_dim,
        epsilon=settings.eps,
    )


def train(config: Any, model: nn.Module, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[float]:
    """The losses of one step after the other, before each update."""
    optimizer = create_optimizer(config, model)
    for t, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, config.optimizer.learning_rate, config.warmup_steps, config.steps)
        image = torch.from_numpy(np.array(batch["image"])).permute(0, 3, 1, 2)
        value = loss(model(image), torch.from_numpy(np.array(batch["label"])), config.label_smoothing)
        optimizer.zero_grad()
        value.backward()
        clip_(list(model.parameters()), config.grad_clip)
        optimizer.step()
        yield value.item()


def losses_side_by_side(run: Run, dataset: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Training losses of this project and of plain PyTorch, from the same weights on the same batches."""
    state = run.create_state()
    model = peer(run, state)
    options = {"batch_size": run.config.batch_size, "seed": run.config.seed, "start_step": 0, "sharding": None}
    batches = list(itertools.islice(train_batches(dataset, run.config.data, **options), steps))

    def ours(state: TrainState) -> Iterator[float]:
        for batch in batches:
            state, sums = run.train_step(state, batch)
            yield float(sums["loss"] / sums["count"])

    first, second = (np.fromiter(each, np.float64) for each in (ours(state), train(run.config, model, batches)))
    return first, second
