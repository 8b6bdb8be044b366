"""The learning rate over a run."""

import optax


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then a cosine to 0 at `total_steps`.

    Args:
      peak: Highest learning rate.
      warmup_steps: Steps of warm-up; shortened to `total_steps` in a shorter run.
      total_steps: Steps of the run.

    Returns:
      The schedule; step t (from 0) gets peak * (t + 1) / warmup_steps in the warm-up, so that the first is not lost on
      0, and the last of the run gets 0, or the peak where all steps are warm-up.
    """
    warmup_steps = min(warmup_steps, total_steps)
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    cosine = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    joined = optax.join_schedules([warmup, cosine], [warmup_steps])
    return lambda step: joined(step + 1)
