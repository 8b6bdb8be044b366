import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.errors import TrainingError
from simplest_vit.training.metrics import _STEPS_IN_FLIGHT, Meter, report_text


def sums(loss, correct, count, grad_norm=1.0, skipped=0, in_a_row=0):
    return {
        "loss": jnp.float32(loss),
        "correct": jnp.float32(correct),
        "count": jnp.float32(count),
        "grad_norm": jnp.float32(grad_norm),
        "skipped_steps": jnp.int32(skipped),
        "skipped_in_a_row": jnp.int32(in_a_row),
    }


SKIPPED = {"loss": 0.0, "correct": 0.0, "count": 0.0, "grad_norm": np.nan}


def test_means_are_over_examples_and_gauges_are_the_last(monkeypatch):
    clock = iter([0.0, 100.0, 104.0, 104.0, 116.0, 116.0])
    monkeypatch.setattr("simplest_vit.training.metrics.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    meter = Meter(batch_size=8, max_skipped_steps=3)
    meter.add(sums(8.0, 2.0, 4.0))
    meter.add(sums(1.0, 1.0, 1.0, grad_norm=3.0))
    report = meter.report(2)
    np.testing.assert_allclose(report["train_loss"], 9 / 5)
    np.testing.assert_allclose(report["train_accuracy"], 3 / 5)
    assert (report["grad_norm"], report["step_time"], report["images_per_second"]) == (3.0, 2.0, 4.0)
    for _ in range(3):
        meter.add(sums(1.0, 1.0, 1.0))
    meter.report(5)
    assert meter.step_time_median == 3.0, "of 2 and 4"


def test_at_most_a_few_steps_are_under_way(monkeypatch):
    waited = []
    monkeypatch.setattr(
        "simplest_vit.training.metrics.jax.block_until_ready", lambda metrics: waited.append(metrics["loss"])
    )
    meter = Meter(batch_size=8, max_skipped_steps=3)
    for step in range(7):
        meter.add(sums(float(step), 1.0, 1.0))
    assert waited == list(map(float, range(7 - _STEPS_IN_FLIGHT)))


def test_skipped_steps_are_counted_and_nothing_else():
    meter = Meter(batch_size=8, max_skipped_steps=3)
    meter.add(sums(8.0, 2.0, 4.0, grad_norm=2.0, skipped=5))
    meter.add(sums(**SKIPPED, skipped=6, in_a_row=1))
    report = meter.report(2)
    assert (report["train_loss"], report["grad_norm"], report["skipped_steps"]) == (2.0, 2.0, 6)
    assert all(np.isfinite(value) for value in report.values())
    assert "skipped 6 steps" in report_text({"epoch": 1.0, **report})
    meter.add(sums(**SKIPPED, skipped=7, in_a_row=2))
    report = meter.report(3)
    assert "train_loss" not in report
    assert "skipped 7 steps" in report_text({"epoch": 1.0, **report})
    meter.add(sums(1.0, 1.0, 1.0))
    assert "skipped" not in report_text({"epoch": 1.0, **meter.report(4)})


def test_too_many_skipped_steps_in_a_row_stop_the_run_also_behind_others():
    meter = Meter(batch_size=8, max_skipped_steps=3)
    for in_a_row in (1, 2, 3):
        meter.add(sums(**SKIPPED, skipped=in_a_row, in_a_row=in_a_row))
    meter.add(sums(1.0, 1.0, 1.0, skipped=3))
    with pytest.raises(TrainingError, match=r"^3 steps in a row up to step 9 were skipped.*checkpoint is intact"):
        meter.report(9)


def test_what_an_interrupted_run_had_not_reported_is_in_the_next_report():
    steps = [sums(8.0, 2.0, 4.0), sums(**SKIPPED, skipped=1, in_a_row=1), sums(0.1, 1.0, 1.0, grad_norm=3.0, skipped=1)]
    whole, before = Meter(8, 3), Meter(8, 3)
    for metrics in steps:
        whole.add(metrics)
    for metrics in steps[:2]:
        before.add(metrics)
    after = Meter(8, 3, json.loads(json.dumps(before.pending_sums())))
    after.add(steps[2])
    times = {"step_time", "steps_per_second", "images_per_second"}
    expected, actual = whole.report(3), after.report(3)
    assert {name: actual[name] for name in actual.keys() - times} == {
        name: expected[name] for name in expected.keys() - times
    }


def test_a_row_of_skipped_steps_before_an_interruption_counts():
    before = Meter(8, 3)
    for in_a_row in (1, 2, 3):
        before.add(sums(**SKIPPED, skipped=in_a_row, in_a_row=in_a_row))
    after = Meter(8, 3, before.pending_sums())
    after.add(sums(1.0, 1.0, 1.0, skipped=3))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        after.report(4)
