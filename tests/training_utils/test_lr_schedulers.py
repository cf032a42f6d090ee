"""Learning-rate schedules against closed forms written down here."""

from __future__ import annotations

import math

import pytest
import torch

from mytune.errors import ConfigError
from mytune.training.lr_schedulers import (
    advanced,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_lr,
)

PEAK, WARMUP, TOTAL = 3e-4, 7, 40


def cosine(step: int) -> float:
    return PEAK * math.cos(math.pi / 2 * (step - WARMUP) / (TOTAL - WARMUP)) ** 2


SCHEDULES = {
    "cosine": (get_cosine_schedule_with_warmup, cosine),
    "linear": (
        get_linear_schedule_with_warmup,
        lambda step: PEAK * (TOTAL - step) / (TOTAL - WARMUP),
    ),
    "constant": (get_constant_schedule_with_warmup, lambda step: PEAK),
}


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in rates or [PEAK]]
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("done", [0, 1, WARMUP - 1, WARMUP, 25, TOTAL - 1])
def test_rates_are_the_closed_form_also_after_resume(name, done):
    build, after_warmup = SCHEDULES[name]
    sgd = optimizer()
    schedule = build(sgd, WARMUP, TOTAL, last_epoch=done - 1)
    for step in range(done, TOTAL):
        expected = PEAK * step / WARMUP if step < WARMUP else after_warmup(step)
        assert abs(get_lr(sgd) - expected) <= 1e-12 * PEAK
        sgd.step()
        schedule.step()


@pytest.mark.parametrize(
    "peak", [PEAK, torch.tensor(PEAK, dtype=torch.float64)], ids=["", "tensor"]
)
def test_an_optimizer_restored_in_mid_schedule_goes_on_from_there(peak):
    first, second = optimizer(peak), optimizer(peak)
    schedule = get_cosine_schedule_with_warmup(first, WARMUP, TOTAL)
    for _ in range(20):
        first.step()
        schedule.step()
    second.load_state_dict(first.state_dict())
    advanced(lambda: get_cosine_schedule_with_warmup(second, WARMUP, TOTAL), second, 20)
    assert get_lr(second) == get_lr(first) == pytest.approx(cosine(20), rel=1e-12)


def test_each_group_keeps_its_own_peak():
    sgd = optimizer(1e-3, 1e-4)
    get_linear_schedule_with_warmup(sgd, 2, 10, last_epoch=0)
    assert [group["lr"] for group in sgd.param_groups] == [0.5e-3, 0.5e-4]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_lowest_rate_can_be_above_zero(name):
    build, after_warmup = SCHEDULES[name]
    for step in (0, WARMUP, 25, TOTAL, TOTAL + 5):
        sgd = optimizer()
        build(sgd, WARMUP, TOTAL, last_epoch=step - 1, min_lr_ratio=0.1)
        expected = 0.1 * PEAK + 0.9 * after_warmup(min(step, TOTAL)) if step >= WARMUP else 0
        assert get_lr(sgd) == pytest.approx(expected, rel=1e-12)


def test_after_the_last_step_the_rate_stays_at_zero():
    sgd = optimizer()
    get_cosine_schedule_with_warmup(sgd, WARMUP, TOTAL, last_epoch=TOTAL + 9)
    assert get_lr(sgd) == 0


def test_a_warmup_longer_than_the_run_warns_and_runs(caplog, monkeypatch):
    monkeypatch.setattr("mytune.training.lr_schedulers.log.propagate", True)
    sgd = optimizer()
    get_cosine_schedule_with_warmup(sgd, 100, 10, last_epoch=4)
    assert get_lr(sgd) == pytest.approx(PEAK * 0.05)
    assert "num_warmup_steps is 100 of the run's 10 steps" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_warmup_steps": -1}, "num_warmup_steps is -1"),
        ({"num_training_steps": 0}, "num_training_steps is 0"),
        ({"num_cycles": 0}, "num_cycles is 0"),
        ({"num_cycles": 1e308}, "num_cycles is 1e"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5"),
        ({"last_epoch": -2}, "last_epoch is -2"),
    ],
)
def test_wrong_arguments_are_config_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        get_cosine_schedule_with_warmup(
            optimizer(), **{"num_warmup_steps": 1, "num_training_steps": 10, **arguments}
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_below_1_is_a_share_of_all_steps(name):
    build, _ = SCHEDULES[name]
    share, steps = optimizer(), optimizer()
    build(share, 0.25, TOTAL, last_epoch=4)
    build(steps, 10, TOTAL, last_epoch=4)
    assert get_lr(share) == get_lr(steps) == pytest.approx(PEAK / 2)
    for wrong in (1.5, -0.1):
        with pytest.raises(ConfigError, match=f"num_warmup_steps is {wrong}; .* a share of all"):
            build(optimizer(), wrong, TOTAL)
