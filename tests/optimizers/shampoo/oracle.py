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


def blocks_of(shape, most):
    """Slices of all blocks: the fewest even ones of each axis; the last may be smaller.

    Those of one shape come region by region, in row-major order.
    """
    axes = []
    for n in shape:
        size = math.ceil(n / math.ceil(n / most))
        axes.append([slice(i, min(i + size, n)) for i in range(0, n, size)])
    return list(itertools.product(*axes))


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

    def __init__(self, shape, slot, *, b1, b2, frequency, start, stagger, whiten=False):
        self.b1, self.b2, self.frequency, self.stagger, self.whiten = b1, b2, frequency, stagger, whiten
        self.start = max(start, frequency) if stagger else start
        self.slot, self.t, self.m, self.v = slot, 0, np.zeros(shape), np.zeros(shape)
        self.statistics = [np.zeros((n, n)) for n in shape]

    def take_in(self, g, roots=None):
        self.t += 1
        for axis, statistics in enumerate(self.statistics):
            white = g
            for other in range(g.ndim) if self.whiten else ():
                if other != axis:
                    white = multiply(white, other, roots[other]) / np.sqrt(g.shape[other])
            new = unfold(white, axis) @ unfold(white, axis).T
            if self.b2 < 1:
                self.statistics[axis] = self.b2 * statistics + (1 - self.b2) * new
            else:
                self.statistics[axis] = statistics + new

    @property
    def is_due(self):
        if self.stagger:
            return (self.t - 1) % self.frequency == self.slot % self.frequency
        return self.t % self.frequency == 0 and self.t >= self.start


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
        initial=0.0,
        stagger=False,
        frequency,
        start,
        grafting="adam",
        exponent=None,
        whiten=False,
    ):
        super().__init__(shape, slot, b1=b1, b2=b2, frequency=frequency, start=start, stagger=stagger, whiten=whiten)
        self.epsilon, self.relative, self.grafting = epsilon, relative, grafting
        self.p = exponent or (2 if whiten else 2 * len(shape))
        if not relative:
            self.statistics = [epsilon * np.eye(n) for n in shape]
        self.roots = [initial * np.eye(n) for n in shape]

    def step(self, g):
        self.take_in(g, self.roots)
        correction = 1 - self.b2**self.t if self.b2 < 1 else 1.0
        if self.is_due:
            self.roots = [root(s / correction, self.p, self.epsilon, self.relative) for s in self.statistics]
        self.m = self.b1 * self.m + (1 - self.b1) * g
        m_hat = self.m / (1 - self.b1**self.t)
        grafted = self.graft(g, m_hat)
        if self.t <= self.start:
            return grafted
        direction = m_hat
        for axis, matrix in enumerate(self.roots):
            direction = multiply(direction, axis, matrix)
        if self.grafting == "none":
            return direction
        return direction * np.linalg.norm(grafted) / (np.linalg.norm(direction) + 1e-16)

    def graft(self, g, m_hat):
        if self.grafting in ("none", "sgd"):
            return m_hat
        if self.grafting == "adagrad":
            self.v = self.v + g * g
            return m_hat / (np.sqrt(self.v) + 1e-8)
        self.v = 0.999 * self.v + 0.001 * g * g
        v_hat = self.v / (1 - 0.999**self.t) if self.grafting == "adam" else self.v
        return m_hat / (np.sqrt(v_hat) + 1e-8)


class Soap(Block):
    """One block. The momentum stays in the parameter's own coordinates; second moments move by squared cosines."""

    def __init__(self, shape, slot=0, *, b1=0.95, b2=0.95, eps=1e-8, frequency, start, stagger, basis):
        super().__init__(shape, slot, b1=b1, b2=b2, frequency=frequency, start=start, stagger=stagger)
        self.eps, self.basis = eps, basis
        self.bases = [np.eye(n) for n in shape]

    def refreshed(self, statistics, basis):
        if self.basis == "eigh":
            return np.linalg.eigh(statistics)[1][:, ::-1]
        return np.linalg.qr(statistics @ basis)[0]

    def step(self, g):
        self.take_in(g)
        if self.is_due and self.t >= self.start:
            new = [self.refreshed(s, q) for s, q in zip(self.statistics, self.bases, strict=True)]
            for axis, basis in enumerate(new):
                self.v = multiply(self.v, axis, (basis.T @ self.bases[axis]) ** 2)
            self.bases = new
        rotated = g
        self.m = self.b1 * self.m + (1 - self.b1) * g
        direction = self.m / (1 - self.b1**self.t)
        for axis, basis in enumerate(self.bases):
            rotated, direction = multiply(rotated, axis, basis.T), multiply(direction, axis, basis.T)
        self.v = self.b2 * self.v + (1 - self.b2) * rotated**2
        direction = direction / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)
        for axis, basis in enumerate(self.bases):
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
        **settings,
    ):
        self.learning_rate, self.weight_decay, self.decoupled = learning_rate, weight_decay, decoupled
        self.shapes, self.methods = {}, {}
        slots = collections.Counter()  # of each block shape
        for k, v in sorted(params.items()):
            layers, shape = (v.shape[0], v.shape[1:]) if k in layered else (1, v.shape)
            shape = merge(shape, max_dim) if merge_dims else shape
            self.shapes[k] = (layers, *shape)
            if adam and len(shape) < 2:
                self.methods[k] = [((slice(None),), Adam(self.shapes[k], **adam))]
                continue
            self.methods[k] = []
            by_shape = collections.defaultdict(list)
            for index in blocks_of(shape, max_dim):
                by_shape[np.zeros(shape)[index].shape].append(index)
            for block_shape, indices in by_shape.items():
                for layer, index in itertools.product(range(layers), indices):
                    self.methods[k].append(((layer, *index), method(block_shape, slots[block_shape], **settings)))
                    slots[block_shape] += 1

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
