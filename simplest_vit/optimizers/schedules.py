"""The learning rate over a run."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """A schedule: linear warm-up from 0, then a cosine to 0.

    During warm-up, step t (from 0) has the rate peak * (t + 1) / warmup_steps, so that the first step is not wasted on
    a rate of 0. The last step of the run has the rate 0, or the peak if all steps are warm-up.

    Attributes:
      peak: The highest learning rate.
      warmup_steps: Steps of warm-up; at most `total_steps` are used.
      total_steps: Steps of the run.
    """

    peak: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return the learning rate of a step, counted from 0."""
        warmup_steps = min(self.warmup_steps, self.total_steps)
        warmup = optax.linear_schedule(0.0, self.peak, warmup_steps)
        cosine = optax.cosine_decay_schedule(self.peak, max(self.total_steps - warmup_steps, 1))
        return optax.join_schedules([warmup, cosine], [warmup_steps])(step + 1)

    def at_peak(self, peak: float) -> "WarmupCosine":
        """Return the same schedule with another peak."""
        return dataclasses.replace(self, peak=peak)
