"""The algorithms once more, in a few lines of NumPy that share nothing with the library: what it is compared with.

A state is an array of shape (workers, dimension): row i is worker i's parameters. ``gradient(worker, step, x)`` is a
worker's stochastic gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Gradient = Callable[[int, int, Vector], Vector]


def quadratic(dimension: int, seed: int = 0) -> Gradient:
    """Gradients of a quadratic that differs from worker to worker and, by noise, from step to step."""

    @cache
    def of_worker(worker: int) -> tuple[Vector, Vector]:
        own = np.random.default_rng([seed, 1, worker])
        return own.uniform(0.2, 1.0, dimension), own.normal(size=dimension)

    @cache
    def of_step(worker: int, step: int) -> Vector:
        return np.random.default_rng([seed, 2, worker, step]).normal(scale=0.3, size=dimension)

    def gradient(worker: int, step: int, x: Vector) -> Vector:
        curvature, centre = of_worker(worker)
        return curvature * (x - centre) + of_step(worker, step)

    return gradient


def constant(dimension: int, seed: int = 0) -> Gradient:
    """Gradients that do not depend on the parameters: integers, so that sums are exact."""

    def gradient(worker: int, step: int, x: Vector) -> Vector:
        return np.random.default_rng([seed, worker, step]).integers(-8, 9, dimension).astype(np.float64)

    return gradient


@dataclass
class Outcome:
    """Parameters and slow momenta of all workers at the end: shape (workers, dimension)."""

    x: Vector
    u: Vector


def slowmo(
    workers: int,
    steps: int,
    start: Vector,
    gradient: Gradient,
    period: int,
    learning_rates: Callable[[int], Any],
    alpha: float = 1.0,
    beta: float = 0.0,
    momentum: float = 0.0,
    buffers: str = "maintain",
    nesterov: bool = False,
    exact_average: bool = True,
) -> Outcome:
    """Algorithm 1 of SlowMo (arXiv 1910.00643) over Local SGD with heavy-ball momentum, line by line, unsharded."""
    x = np.tile(start, (workers, 1))
    anchor, u, m = x.copy(), np.zeros_like(x), np.zeros_like(x)
    for step in range(steps):
        d = np.array([gradient(i, step, x[i]) for i in range(workers)])
        m = momentum * m + d
        x = x - learning_rates(step) * m
        if (step + 1) % period == 0:
            gamma = np.mean([learning_rates(k) for k in range(step + 1 - period, step + 1)], axis=0)
            mean = x.mean(axis=0) * np.ones_like(x) if exact_average else x
            moved = np.where(gamma == 0, 0, (anchor - mean) / np.where(gamma == 0, 1, gamma))
            new_u = np.where(gamma == 0, u, beta * u + moved)
            direction = beta * new_u + moved if nesterov else new_u
            x = np.where(gamma == 0, mean, anchor - alpha * gamma * direction)
            anchor, u = x.copy(), new_u
            m = {"maintain": m, "reset": np.zeros_like(m), "average": m.mean(axis=0) * np.ones_like(m)}[buffers]
    return Outcome(x, u)


def diloco(
    workers: int,
    steps: int,
    start: Vector,
    gradient: Gradient,
    period: int,
    learning_rates: Callable[[int], Any],
    outer_lr: float,
    outer_momentum: float,
    nesterov: bool = True,
) -> Vector:
    """DiLoCo (arXiv 2311.08105) over plain SGD, with the outer step as torch documents its SGD; shape (dimension,)."""
    anchor, velocity = start.copy(), np.zeros_like(start)
    for first in range(0, steps, period):
        moved = []
        for worker in range(workers):
            x = anchor.copy()
            for step in range(first, min(first + period, steps)):
                x = x - learning_rates(step) * gradient(worker, step, x)
            moved.append(anchor - x)
        outer_gradient = np.mean(moved, axis=0)
        velocity = outer_momentum * velocity + outer_gradient
        direction = outer_gradient + outer_momentum * velocity if nesterov else velocity
        anchor = anchor - outer_lr * direction
    return anchor


def uneven_slowmo(
    counts: Sequence[int],
    start: Vector,
    gradient: Gradient,
    period: int,
    learning_rates: Callable[[int], float],
    alpha: float = 1.0,
    beta: float = 0.0,
    adapted: Callable[[list[float]], int] | None = None,
    loss: Callable[[Vector], float] = lambda x: 0.0,
) -> Outcome:
    """Algorithm 1 of SlowMo where worker i has only ``counts[i]`` batches: means are over those that took steps.

    ``adapted`` gives the next period from the mean losses of all rounds so far.
    """
    x, u, left, first = np.tile(start, (len(counts), 1)), np.zeros_like(start), np.array(counts), 0
    round_losses: list[float] = []
    while left.any():
        anchor, taken, losses = x[0].copy(), np.minimum(left, period), []
        for i, count in enumerate(taken):
            seen = []
            for step in range(first, first + count):
                seen.append(loss(x[i]))
                x[i] -= learning_rates(step) * gradient(i, step, x[i])
            losses += [np.mean(seen)] if count else []
        gamma = np.mean([learning_rates(step) for step in range(first, first + taken.max())])
        u = beta * u + (anchor - x[taken > 0].mean(axis=0)) / gamma
        x[:] = anchor - alpha * gamma * u
        left, first = left - taken, first + int(taken.max())
        round_losses.append(float(np.mean(losses)))
        period = adapted(round_losses) if adapted else period
    return Outcome(x, np.tile(u, (len(counts), 1)))


def uneven_synchronous_sgd(
    counts: Sequence[int],
    start: Vector,
    gradient: Gradient,
    learning_rates: Callable[[int], float],
    momentum: float = 0.0,
) -> Vector:
    """Heavy-ball SGD on the gradient averaged over the workers that still have batches; shape (dimension,)."""
    x, m = start.copy(), np.zeros_like(start)
    for step in range(max(counts)):
        m = momentum * m + np.mean([gradient(i, step, x) for i, count in enumerate(counts) if step < count], axis=0)
        x = x - learning_rates(step) * m
    return x


def until(counts: Sequence[int], gradient: Gradient) -> Gradient:
    """The gradient, zero for a worker that has run out of batches."""
    return lambda worker, step, x: gradient(worker, step, x) if step < counts[worker] else np.zeros_like(x)


def synchronous_sgd(
    workers: int, steps: int, start: Vector, gradient: Gradient, learning_rate: float, momentum: float = 0.0
) -> Vector:
    """Heavy-ball SGD on the gradient averaged over workers; shape (dimension,)."""
    x, m = start.copy(), np.zeros_like(start)
    for step in range(steps):
        m = momentum * m + np.mean([gradient(i, step, x) for i in range(workers)], axis=0)
        x = x - learning_rate * m
    return x


def lookahead(steps: int, start: Vector, gradient: Gradient, learning_rate: float, k: int, alpha: float) -> Vector:
    """Lookahead (Zhang et al., 2019) over SGD: every k steps the slow weights go a fraction alpha to the fast."""
    slow = fast = start
    for step in range(steps):
        fast = fast - learning_rate * gradient(0, step, fast)
        if (step + 1) % k == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow
    return fast


@dataclass
class Gossip:
    """Biased parameters and push-sum weights of all workers, without what is in flight."""

    x: Vector
    w: Vector

    @property
    def z(self) -> Vector:
        return self.x / self.w[:, None]


def push_sum_sgd(
    workers: int,
    steps: int,
    start: Vector,
    gradient: Gradient,
    mixing_matrix: Callable[[int], Vector],
    learning_rate: float,
    staleness: int = 0,
    period: int | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    exact_average: bool = True,
    wire_dtype: Any = np.float64,
) -> Gossip:
    """SGP (arXiv 1811.10792), with messages ``staleness`` steps late; SlowMo over it if there is a period.

    Each message is rounded to ``wire_dtype``; who sends it keeps the rest.
    """
    x, w = np.tile(start, (workers, 1)), np.ones(workers)
    anchor, u = x.copy(), np.zeros_like(x)
    in_flight: list[tuple[Vector, Vector]] = []
    for step in range(steps):
        z = x / w[:, None]
        x = x - learning_rate * np.array([gradient(i, step, z[i]) for i in range(workers)])
        matrix = mixing_matrix(step)
        kept = np.diag(matrix)
        if staleness and len(in_flight) == staleness:
            arrived_x, arrived_w = in_flight.pop(0)
            x, w = x + arrived_x, w + arrived_w
        others = matrix - np.diag(kept)
        messages = (others[:, :, None] * x).astype(wire_dtype).astype(np.float64)  # by receiver, by sender
        in_flight.append((messages.sum(axis=1), others @ w))
        x, w = x - messages.sum(axis=0), kept * w
        if not staleness:
            arrived_x, arrived_w = in_flight.pop(0)
            x, w = x + arrived_x, w + arrived_w
        if period and (step + 1) % period == 0:
            if exact_average:
                for arrived_x, arrived_w in in_flight:
                    x, w = x + arrived_x, w + arrived_w
                in_flight.clear()
                mean = x.mean(axis=0) * np.ones_like(x)
                u = beta * u + (anchor - mean) / learning_rate
                x, w = anchor - alpha * learning_rate * u, np.ones(workers)
                anchor = x.copy()
            else:
                z = x / w[:, None]
                u = beta * u + (anchor - z) / learning_rate
                anchor = anchor - alpha * learning_rate * u
                x = anchor * w[:, None]
    return Gossip(x, w)


def adacomm_by_validation(losses: Vector, first_period: int) -> list[int]:
    """AdaComm's periods (arXiv 1810.08313, equations 18 and 19) where each round ends with a decision.

    ``losses``: each worker's validation loss in each round, shape (rounds, workers); NaN from those that have none.
    """
    means = [float(np.nanmean(row)) for row in losses if not np.isnan(row).all()]
    periods = [first_period]
    for mean in means[1:]:
        wanted = int(np.ceil(np.sqrt(mean / means[0]) * first_period - 1e-6))
        periods.append(wanted if wanted < periods[-1] else max(1, periods[-1] // 2))
    return periods


def delayed_slowmo(
    workers: int,
    steps: int,
    start: Vector,
    gradient: Gradient,
    period: int,
    learning_rates: Callable[[int], Any],
    alpha: float,
    beta: float,
    momentum: float,
    buffers: str,
    nesterov: bool,
    delay: int | Callable[[int], int],
    blend: float | None,
    gap_penalty: float = 1.0,
    momentum_clip: float = np.inf,
) -> Vector:
    """SlowMo over Local SGD whose average is adopted ``delay`` steps late; shape (workers, dimension).

    The delay may depend on the number of the round that contributes, from 1. The last two are CO2's.
    """
    delay_of = delay if callable(delay) else lambda number: delay
    x, m = np.tile(start, (workers, 1)), np.zeros((workers, start.size))
    anchor, u = start.copy(), np.zeros_like(start)
    contributed, gamma, due = x.copy(), 0.0, -1
    for step in range(steps):
        m = momentum * m + np.array([gradient(i, step, x[i]) for i in range(workers)])
        x = x - learning_rates(step) * m
        for contributes in (False, (step + 1) % period == 0):
            if contributes:
                contributed, due = x.copy(), step + 1 + delay_of((step + 1) // period)
                gamma = float(np.mean([learning_rates(k) for k in range(step + 1 - period, step + 1)]))
            if step + 1 == due:
                moved = (anchor - contributed.mean(axis=0)) / gamma / gap_penalty
                u, due = np.clip(beta * u + moved, -momentum_clip, momentum_clip), -1
                anchor = anchor - alpha * gamma * (beta * u + moved if nesterov else u)
                x = anchor + (x - contributed) if blend is None else blend * x + (1 - blend) * anchor
                m = np.zeros_like(m) if buffers == "reset" else m
    return x


def unequal_slowmo(
    rounds: int,
    start: Vector,
    gradient: Gradient,
    steps: Callable[[int], Sequence[int]],
    learning_rate: float,
    alpha: float,
    beta: float,
    weighting: str,
) -> Vector:
    """SlowMo over plain SGD in rounds of unequal numbers of steps; shape (dimension,), equal on all workers.

    Args:
        steps: number of steps of each worker in a round, of which the number is given, from 0. The steps that a worker
            is given for its gradients are counted by the worker that takes most of them.
        weighting: "equal"; "steps", by these numbers; or "normalized": as many mean gradients as the most steps.
    """
    anchor, u, first = start.copy(), np.zeros_like(start), 0
    for number in range(rounds):
        ends = []
        for worker, count in enumerate(steps(number)):
            x = anchor.copy()
            for step in range(first, first + count):
                x = x - learning_rate * gradient(worker, step, x)
            ends.append(x)
        first += max(steps(number))
        moved = (
            anchor - np.average(ends, axis=0, weights=steps(number) if weighting == "steps" else None)
        ) / learning_rate
        if weighting == "normalized":
            moved = max(steps(number)) * sum(anchor - end for end in ends) / sum(steps(number)) / learning_rate
        u = beta * u + moved
        anchor = anchor - alpha * learning_rate * u
    return anchor


def streaming_diloco(
    workers: int,
    steps: int,
    start: Vector,
    gradient: Gradient,
    learning_rates: Callable[[int], Any],
    fragments: Sequence[tuple[slice, int]],
    period: int,
    delay: int,
    outer_lr: float,
    outer_momentum: float,
    nesterov: bool,
) -> Vector:
    """Streaming DiLoCo over plain SGD, which adds what a worker has moved meanwhile; shape (workers, dimension).

    Each fragment is a range of the parameters, and the step of every round after which it is contributed.
    """
    x = np.tile(start, (workers, 1))
    anchor, velocity, contributed = start.copy(), np.zeros_like(start), x.copy()
    for step in range(1, steps + 1):
        x = x - learning_rates(step - 1) * np.array([gradient(i, step - 1, x[i]) for i in range(workers)])
        for part, due in fragments:
            if step > delay and (step - delay - due) % period == 0 and step - delay >= due:
                outer_gradient = anchor[part] - contributed[:, part].mean(axis=0)
                velocity[part] = outer_momentum * velocity[part] + outer_gradient
                direction = outer_gradient + outer_momentum * velocity[part] if nesterov else velocity[part]
                anchor[part] = anchor[part] - outer_lr * direction
                x[:, part] = anchor[part] + (x[:, part] - contributed[:, part])
        for part, due in fragments:
            if (step - due) % period == 0 and step >= due:
                contributed[:, part] = x[:, part]
    return x
