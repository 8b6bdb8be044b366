"""Shampoo and SOAP in float64 NumPy, written from the formulas: one matrix at a time, in plain loops."""

import collections
import itertools
import math

import numpy as np


def merge(shape, threshold):
    """The reference's merging: a dimension joins the one before it while the product is small enough."""
    result = list(shape[:1])
    for size in shape[1:]:
        small = result[-1] * size <= threshold or 1 in (result[-1], size)
        result = [*result[:-1], result[-1] * size] if small else [*result, size]
    return tuple(result)


def preconditioned(shape, one_sided=False, ignored=math.inf):
    """The axes of a block that have a matrix: neither ignored ones, nor those of size 1 beside longer ones."""
    axes = [axis for axis, n in enumerate(shape) if n <= ignored]
    if any(shape[axis] > 1 for axis in axes):
        axes = [axis for axis in axes if shape[axis] > 1]
    return sorted(axes, key=lambda axis: shape[axis])[:1] if one_sided else axes


def blocks_of(shape, most, ignored=math.inf, even=True):
    """The shape of a full block, and slices of all blocks in row-major order.

    Of each axis that is not ignored there are the fewest even ones, or full ones and a remainder.
    """
    full = [n if n > ignored else math.ceil(n / math.ceil(n / most)) if even else min(n, most) for n in shape]
    axes = [[slice(i, i + size) for i in range(0, n, size)] for n, size in zip(shape, full, strict=True)]
    return tuple(full), list(itertools.product(*axes))


def unfold(tensor, axis):
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def multiply(tensor, axis, matrix):
    return np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)


def root(matrix, p, epsilon, relative):
    if relative:
        matrix = matrix + epsilon * np.linalg.norm(matrix) * np.eye(len(matrix))
        values, vectors = np.linalg.eigh(matrix)
    else:
        values, vectors = np.linalg.eigh(matrix)
        values = values + max(0.0, -values.min()) + epsilon
    return vectors @ np.diag(values ** (-1 / p)) @ vectors.T


class Block:
    """What all methods share: statistics, and whose turn it is."""

    def __init__(self, shape, slot, *, b1, b2, beta=None, frequency, start, axes, stagger=False, whiten=False):
        self.b1, self.b2, self.frequency, self.stagger, self.whiten = b1, b2, frequency, stagger, whiten
        self.start = self.first_due = start
        self.beta = b2 if beta is None else beta
        self.slot, self.t, self.m, self.v = slot, 0, np.zeros(shape), np.zeros(shape)
        self.statistics = {axis: np.zeros((shape[axis], shape[axis])) for axis in axes}

    def take_in(self, g, roots=None):
        self.t += 1
        for axis, statistics in self.statistics.items():
            white = g
            for other in range(g.ndim) if self.whiten else ():
                if other != axis:
                    white = multiply(white, other, roots.get(other, np.eye(g.shape[other]))) / np.sqrt(g.shape[other])
            new = unfold(white, axis) @ unfold(white, axis).T
            if self.beta < 1:
                self.statistics[axis] = self.beta * statistics + (1 - self.beta) * new
            else:
                self.statistics[axis] = statistics + new

    @property
    def is_due(self):
        if self.stagger:
            return (self.t - 1) % self.frequency == self.slot % self.frequency
        return self.t % self.frequency == 0 and self.t >= self.first_due


class Shampoo(Block):
    """One block; `step` returns the direction to subtract."""

    def __init__(
        self,
        shape,
        slot=0,
        *,
        b1=0.9,
        b2=0.999,
        epsilon=1e-12,
        relative=False,
        grafting="adam",
        grafting_b2=0.999,
        grafting_epsilon=1e-8,
        exponent=None,
        **common,
    ):
        super().__init__(shape, slot, b1=b1, b2=b2, **common)
        self.start = max(self.start, self.frequency)
        self.first_due = self.start - self.frequency + 1  # so that there is a root after the start
        self.epsilon, self.relative, self.grafting = epsilon, relative, grafting
        self.grafting_b2, self.grafting_epsilon = grafting_b2, grafting_epsilon
        self.p = exponent or (2 if self.whiten else 2 * len(self.statistics))
        self.roots = {axis: np.eye(len(s)) for axis, s in self.statistics.items()}
        if not relative:
            self.statistics = {axis: epsilon * np.eye(len(s)) for axis, s in self.statistics.items()}

    def step(self, g):
        self.take_in(g, self.roots)
        correction = 1 - self.b2**self.t if self.b2 < 1 else 1.0
        if self.is_due:
            self.roots = {
                axis: root(s / correction, self.p, self.epsilon, self.relative) for axis, s in self.statistics.items()
            }
        self.m = self.b1 * self.m + (1 - self.b1) * g
        m_hat = self.m / (1 - self.b1**self.t)
        grafted = self.graft(g, m_hat)
        if self.t <= self.start:
            return grafted
        direction = m_hat
        for axis, matrix in self.roots.items():
            direction = multiply(direction, axis, matrix)
        if self.grafting == "none":
            return direction
        return direction * np.linalg.norm(grafted) / (np.linalg.norm(direction) + 1e-16)

    def graft(self, g, m_hat):
        if self.grafting in ("none", "sgd"):
            return m_hat
        b2, epsilon = self.grafting_b2, self.grafting_epsilon
        if self.grafting == "adagrad":
            self.v = self.v + g * g
            return m_hat / (np.sqrt(self.v) + epsilon)
        self.v = b2 * self.v + (1 - b2) * g * g
        v_hat = self.v / (1 - b2**self.t) if self.grafting == "adam" else self.v
        return m_hat / (np.sqrt(v_hat) + epsilon)


class Soap(Block):
    """One block. The momentum stays in the parameter's own coordinates; second moments move by squared cosines.

    Bases are also refreshed in each of the first steps after the start, as many as the frequency says.
    """

    def __init__(self, shape, slot=0, *, b1=0.95, b2=0.95, eps=1e-8, basis, **common):
        super().__init__(shape, slot, b1=b1, b2=b2, **common)
        self.eps, self.basis = eps, basis
        self.bases = {axis: np.eye(len(s)) for axis, s in self.statistics.items()}

    def refreshed(self, statistics, basis):
        if self.basis == "eigh":
            return np.linalg.eigh(statistics)[1][:, ::-1]
        return np.linalg.qr(statistics @ basis)[0]

    def step(self, g):
        self.take_in(g)
        is_early = self.start < self.t <= self.start + self.frequency
        if is_early or (self.is_due and self.t >= self.start):
            new = {axis: self.refreshed(s, self.bases[axis]) for axis, s in self.statistics.items()}
            for axis, basis in new.items():
                self.v = multiply(self.v, axis, (basis.T @ self.bases[axis]) ** 2)
            self.bases = new
        rotated = g
        self.m = self.b1 * self.m + (1 - self.b1) * g
        direction = self.m / (1 - self.b1**self.t)
        for axis, basis in self.bases.items():
            rotated, direction = multiply(rotated, axis, basis.T), multiply(direction, axis, basis.T)
        self.v = self.b2 * self.v + (1 - self.b2) * rotated**2
        direction = direction / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)
        for axis, basis in self.bases.items():
            direction = multiply(direction, axis, basis)
        return direction


class Adam:
    """What is not preconditioned."""

    def __init__(self, shape, *, b1, b2, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.t, self.m, self.v = 0, np.zeros(shape), np.zeros(shape)

    def step(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m_hat, v_hat = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


class Optimizer:
    """Merges, blocks and steps a dict of arrays, whose names are sorted; weight decay is coupled or not.

    `adam`: the settings of vectors, which else are preconditioned; `layered`: names of parameters with a leading axis
    of layers.
    """

    def __init__(
        self,
        params,
        method,
        *,
        learning_rate,
        max_dim,
        merge_dims,
        weight_decay=0.0,
        decoupled=False,
        adam=None,
        layered=(),
        one_sided=False,
        ignored=math.inf,
        even=True,
        stagger=False,
        **settings,
    ):
        self.learning_rate, self.weight_decay, self.decoupled = learning_rate, weight_decay, decoupled
        self.shapes, self.methods = {}, {}
        slots = collections.Counter()  # of each shape of full blocks and its axes
        made = []
        for k, v in sorted(params.items()):
            layers, shape = (v.shape[0], v.shape[1:]) if k in layered else (1, v.shape)
            shape = merge(shape, max_dim) if merge_dims else shape
            self.shapes[k] = (layers, *shape)
            if adam and len(shape) < 2:
                self.methods[k] = [((slice(None),), Adam(self.shapes[k], **adam))]
                continue
            self.methods[k] = []
            axes = preconditioned(shape, one_sided, ignored)
            full, indices = blocks_of(shape, max_dim, ignored, even)
            for layer, index in itertools.product(range(layers), indices):
                kind = full, tuple(axes)
                block = method(np.zeros(shape)[index].shape, slots[kind], axes=axes, **settings)
                self.methods[k].append(((layer, *index), block))
                slots[kind] += 1
                made.append(block)
        # In turns only if that costs at most twice as much as all together.
        cubes = {kind: sum(kind[0][axis] ** 3 for axis in kind[1]) for kind in slots}
        together = sum(count * cubes[kind] for kind, count in slots.items())
        in_turns = sum(math.ceil(n / settings["frequency"]) * cubes[kind] for kind, n in slots.items())
        for block in made:
            block.stagger = stagger and in_turns * settings["frequency"] <= 2 * together

    def step(self, params, grads):
        result = {}
        for k, p in params.items():
            decay = self.weight_decay * p
            g = (grads[k] + (0.0 if self.decoupled else decay)).reshape(self.shapes[k])
            update = np.zeros_like(g)
            for index, method in self.methods[k]:
                update[index] = method.step(g[index])
            result[k] = p - self.learning_rate * (update.reshape(p.shape) + (decay if self.decoupled else 0.0))
        return result
