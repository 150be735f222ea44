"""Low-rank maps fitted to responses as they are after the activation, by alternation.

``min sum_i |r(y_i) - r(P Q^T f_i + b + s_i)|^2``: f the responses of the layer in the net approximated so
far, or features of another kind; y those of the original net; s a shortcut added before the activation.
Relaxed with z for the argument of the second r, at a penalty lambda: z is solved element by element in
closed form, P, Q, b by reduced-rank regression of z - s on f.

Features are centred and whitened once, so that the regression needs one matrix product of the features with
the change of z, and one small eigenproblem. Samples pass in chunks, in single precision; sums over chunks and
small problems are double.

Reference: Zhang et al. 2015, arXiv:1505.06798, sections on the nonlinear case and asymmetric reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from .linalg import RIDGE, AffineMap, Array, from_moments, leading, prior_term, unmix, whiten
from .stats import Moments

SCHEDULE = ((0.01, 25), (1.0, 25))  # (lambda, iterations), of the paper
PARTS = 4  # of the samples, seen in turn until the last iterations of a phase

_CHUNK_NUMBERS = 2**19  # of the larger of the two sides of a chunk
_LEAST_PER_FEATURE = 12  # samples a feature, at least, in a part
_FULL_ITERATIONS = 5  # that end a phase, on all samples

Samples = NDArray[Any]
HeldOut = tuple[Samples, Samples] | tuple[Samples, Samples, Samples]


class Options(TypedDict, total=False):
    """Keyword options of the fits.

    activation: "relu" (default), "leaky", "prelu", "relu6" or "none".
    slope: of "leaky" and "prelu" below zero: a number, or (d,) one a channel.
    shortcut: (n, d), the approximated shortcut, added to the prediction before the activation. The responses
        are then those of the original net after its own shortcut was added.
    schedule: phases (lambda, iterations); the paper's by default.
    ridge: as in `linalg.from_moments`.
    holdout: the iterate is chosen by its loss on these samples, (features, responses) or (features,
        responses, shortcut); or a share of the samples, the last ones, which then are not fitted to.
    parts: all but the last 5 iterations of a phase see one of so many parts of the samples, in turn, evenly
        spaced; fewer where a part would have less than 12 samples a feature; 1 for all in every iteration.
    dtype: of the passes over samples; np.float32 by default.
    """

    activation: str
    slope: float | Samples | None
    shortcut: Samples | None
    schedule: Sequence[tuple[float, int]]
    ridge: float
    holdout: float | HeldOut | None
    parts: int
    dtype: type[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted map ``P Q^T f + b``, and how it came about.

    P (d, rank), Q (m, rank), b (d,). `losses[i]` is the loss after i iterations, 0 being the linear start:
    ``sum |r(y) - r(prediction)|^2 / sum |r(y)|^2`` on held-out samples where there are any, else on the
    fitted ones; nan where it was not measured, in iterations on parts of the samples without held-out ones. `iteration` is the
    one chosen, of least loss. `total` is ``sum |r(y)|^2`` of those samples, 1 where that is 0: what the losses
    are relative to.
    """

    P: Array
    Q: Array
    b: Array
    losses: tuple[float, ...]
    iteration: int
    total: float

    @property
    def loss(self) -> float:
        """Loss of the map chosen."""
        return self.losses[self.iteration]

    @property
    def mapping(self) -> AffineMap:
        """P, Q and b."""
        return AffineMap(self.P, self.Q, self.b)

    @property
    def matrix(self) -> Array:
        """The map as one matrix, (d, m)."""
        return self.P @ self.Q.T


def fit(Y_hat: Samples, Y: Samples, rank: int | None, **options: Unpack[Options]) -> AffineMap:
    """``r(Y) ~ r(Y_hat Q P^T + b)``: low-rank map of responses, drawn toward the identity.

    Never worse than the linear fit on the samples that it is judged by. See `Options` for the keywords.

    Args:
        Y_hat: (n, d), responses to the inputs that the approximated net has.
        Y: (n, d), responses of the original net, before the activation.
        rank: 1 <= rank <= d; None for a full matrix, P = I.

    Returns:
        P (d, rank), Q (d, rank), b (d,).

    Raises:
        ValueError: shapes do not fit, no sample, a rank out of range, an unknown activation, an impossible
            option, or a value that is not finite.

    Reference: Zhang et al. 2015, arXiv:1505.06798, equations 6 to 12.
    """
    return fit_responses(Y_hat, Y, rank, **options).mapping


def fit_responses(Y_hat: Samples, Y: Samples, rank: int | None, **options: Unpack[Options]) -> Fit:
    """As `fit`, with the losses of every iteration."""
    return fit_features(Y_hat, Y, rank, 1.0, **options)


def fit_features(
    F: Samples,
    Y: Samples,
    rank: int | None = None,
    prior: float | Array = 0.0,
    **options: Unpack[Options],
) -> Fit:
    """``r(Y) ~ r(F Q P^T + b)``: map from any features to responses. See `Options` for the keywords.

    Args:
        F: (n, m).
        Y: (n, d).
        rank: 1 <= rank <= min(m, d); None for a full matrix, P = I.
        prior: (d, m), the map that the ridge draws to; or a number: that times the identity.

    Raises:
        ValueError: see `fit`.
    """
    data, held_out = _divide(F, Y, options)
    name = options.get("activation", "relu")
    activation = _activation(name, options.get("slope"), Y.shape[1])
    common = _Common(
        rank,
        prior,
        activation,
        options.get("ridge", RIDGE),
        options.get("parts", PARTS),
        np.dtype(options.get("dtype", np.float32)),
    )
    problem = _Problem(data, common)
    best = _Best(_Judge(problem, held_out), problem.start)
    phases = [] if name == "none" else list(options.get("schedule", SCHEDULE))
    _check_schedule(phases, common.parts)
    current = problem.start
    for penalty, iterations in phases:
        for found, loss in problem.iterates(current, penalty, iterations):
            best.offer(found, loss)
            current = found
    return best.fit()


class _Data(NamedTuple):
    """Samples as given: features (n, m), responses (n, d), shortcut (n, d) or None."""

    features: Samples
    responses: Samples
    shortcut: Samples | None

    def rows(self, rows: slice) -> _Data:
        return _Data(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


class _Common(NamedTuple):
    rank: int | None
    prior: float | Array
    activation: _Activation
    ridge: float
    parts: int
    dtype: np.dtype[Any]


class _Model(NamedTuple):
    """A map in the frame of whitened features: ``U G w + c``."""

    basis: Array  # (d, r)
    rows: Array  # (r, m)
    offset: Array  # (d,)


class _Sweep(NamedTuple):
    """One pass: the loss of a model, and what the step from its prediction t to z adds up to."""

    loss: float  # relative; nan for a part of the samples
    cross: Array  # mean of (z - t) w^T, (d, m)
    shift: Array  # mean of z - t, (d,)


class _Problem:
    """Samples, their frame, and the steps of the alternation on them."""

    def __init__(self, data: _Data, common: _Common) -> None:
        self.common = common
        moments = _moments(data)
        self.mean = moments.mean
        self.whitening = whiten(moments.covariance, common.ridge)
        self.start = from_moments(
            moments.covariance,
            moments.cross_covariance,
            moments.mean,
            moments.other_mean,
            common.rank,
            ridge=common.ridge,
            prior=common.prior,
        )
        self._gram = unmix(self.whitening, unmix(self.whitening, moments.covariance).T)  # cov(w)
        self._pull = prior_term(self.whitening, common.prior, len(moments.other_mean))
        self.samples = _Whitened(self, data)

    def enter(self, found: AffineMap) -> _Model:
        """The same map on whitened features."""
        return _Model(found.P, found.Q.T @ self.whitening.factor, found.b + found.P @ (found.Q.T @ self.mean))

    def leave(self, model: _Model) -> AffineMap:
        """The same map on the features as given."""
        Q = scipy.linalg.solve_triangular(self.whitening.factor, model.rows.T, lower=True, trans="T")
        return AffineMap(model.basis, Q, model.offset - model.basis @ (Q.T @ self.mean))

    def whitened(self, features: Samples) -> Array:
        """Features (n, m) centred and unmixed, float64."""
        return unmix(self.whitening, np.asarray(features, dtype=np.float64) - self.mean)

    def loss(self, found: AffineMap) -> float:
        """Relative loss of a map on the samples."""
        return self.samples.sweep(self.enter(found)).loss

    def iterates(
        self, start: AffineMap, penalty: float, iterations: int
    ) -> Iterator[tuple[AffineMap, float]]:
        """Maps after each iteration at one penalty, with their losses; nan where the next sees only a part.

        What a part adds to the moments is the step from the prediction t to z. The moments of t itself, far
        the larger, are known exactly: so a part is nearly as good as all.
        """
        model = self.enter(start)
        sweep = self.samples.sweep(model, penalty, self._part(0, iterations))
        for done in range(1, iterations + 1):
            model = self._improve(model, sweep)
            if done < iterations:
                sweep = self.samples.sweep(model, penalty, self._part(done, iterations))
            else:
                sweep = self.samples.sweep(model)
            yield self.leave(model), sweep.loss

    def _part(self, done: int, iterations: int) -> int | None:
        return None if iterations - done <= _FULL_ITERATIONS else done % self.samples.parts

    def _improve(self, model: _Model, sweep: _Sweep) -> _Model:
        """Regression of z - s on the features: z - s = t + (z - t), of which t, the model, is known."""
        seen = model.basis @ (model.rows @ self._gram) + sweep.cross + self._pull
        return _Model(*leading(seen, self.common.rank), model.offset + sweep.shift)


class _Whitened:
    """Whitened features, activated responses and shortcuts of some samples, and buffers to pass over them.

    Row r belongs to part ``r % parts``; the rows of a part are stored together.
    """

    def __init__(self, problem: _Problem, data: _Data) -> None:
        common = problem.common
        self._activation, self._full_rank, dtype = common.activation, common.rank is None, common.dtype
        n, m, d = len(data.features), data.features.shape[1], data.responses.shape[1]
        self.parts = max(1, min(common.parts, n // (_LEAST_PER_FEATURE * m)))
        self._ends = np.cumsum([0, *(len(range(part, n, self.parts)) for part in range(self.parts))]).tolist()
        self._chunk = max(1, min(n, _CHUNK_NUMBERS // max(m, d)))
        self._features = np.empty((n, m), dtype)
        self._targets = np.empty((n, d), dtype)
        self._shortcut = None if data.shortcut is None else np.empty((n, d), dtype)
        for part in range(self.parts):
            self._store(problem, part, data.rows(slice(part, None, self.parts)))
        self.total = math.fsum(_squares(self._targets[rows]) for rows in self._chunks(None)) or 1.0
        self._block = np.empty((d, m), dtype)
        self._predicted, self._step, self._work = (np.empty((self._chunk, d), dtype) for _ in range(3))

    def _store(self, problem: _Problem, part: int, data: _Data) -> None:
        start = self._ends[part]
        for rows in self._chunks(part):
            given = data.rows(slice(rows.start - start, rows.stop - start))
            self._features[rows] = problem.whitened(given.features)
            self._activation.apply(given.responses.astype(self._targets.dtype), self._targets[rows])
            if self._shortcut is not None:
                self._shortcut[rows] = given.shortcut

    def sweep(self, model: _Model, penalty: float | None = None, part: int | None = None) -> _Sweep:
        """Loss of a model; with a penalty also the means of the step to z; over one part or all."""
        rows, offset = model.rows.astype(self._features.dtype), model.offset.astype(self._features.dtype)
        basis = None if self._full_rank else model.basis.astype(self._features.dtype)
        cross, shift, loss, n = np.zeros(self._block.shape), np.zeros(len(offset)), 0.0, 0
        for chunk in self._chunks(part):
            n += chunk.stop - chunk.start
            features, targets = self._features[chunk], self._targets[chunk]
            t, step, work = (b[: len(features)] for b in (self._predicted, self._step, self._work))
            self._predict(features, basis, rows, t)
            t += offset
            if self._shortcut is not None:
                t += self._shortcut[chunk]
            self._activation.apply(t, work)
            work -= targets
            loss += _squares(work)
            if penalty is not None:
                self._activation.step(t, targets, penalty, step, work)
                cross += np.matmul(step.T, features, out=self._block)
                shift += np.ones(len(step), step.dtype) @ step
        whole = n == len(self._features)
        return _Sweep(loss / self.total if whole else math.nan, cross / n, shift / n)

    def _predict(self, features: Samples, basis: Samples | None, rows: Samples, out: Samples) -> None:
        if basis is None:
            np.matmul(features, rows.T, out=out)
        else:
            np.matmul(features @ rows.T, basis.T, out=out)

    def _chunks(self, part: int | None) -> Iterator[slice]:
        first, last = (0, self._ends[-1]) if part is None else self._ends[part : part + 2]
        for start in range(first, last, self._chunk):
            yield slice(start, min(start + self._chunk, last))


class _Judge:
    """The loss by which iterates are compared: on held-out samples where there are any."""

    def __init__(self, problem: _Problem, held_out: _Data | None) -> None:
        self._problem = problem
        self._held_out = None if held_out is None else _Whitened(problem, held_out)
        self.total = (self._held_out or problem.samples).total

    def loss(self, found: AffineMap, fitted: float | None = None) -> float:
        """Loss of a map; `fitted` is that on the fitted samples, where known."""
        if self._held_out is not None:
            return self._held_out.sweep(self._problem.enter(found)).loss
        return self._problem.loss(found) if fitted is None else fitted


class _Best:
    """The map of least loss so far, the earliest of equals."""

    def __init__(self, judge: _Judge, start: AffineMap) -> None:
        self._judge, self._found, self._iteration = judge, start, 0
        self._losses = [judge.loss(start)]

    def offer(self, found: AffineMap, fitted: float) -> None:
        self._losses.append(self._judge.loss(found, fitted))
        if self._losses[-1] < self._losses[self._iteration]:
            self._found, self._iteration = found, len(self._losses) - 1

    def fit(self) -> Fit:
        return Fit(*self._found, tuple(self._losses), self._iteration, self._judge.total)


class _Activation(Protocol):
    """An activation r, elementwise."""

    def apply(self, t: Samples, out: Samples) -> None:
        """``r(t)`` into `out`."""

    def step(self, t: Samples, target: Samples, penalty: float, out: Samples, work: Samples) -> None:
        """``z - t`` into `out`, z the minimum of ``(target - r(z))^2 + penalty (z - t)^2``; `work` is scratch."""


class _Relu:
    """z is ``(penalty t + a) / (penalty + 1)`` above ``t = -a (sqrt(1 + 1 / penalty) - 1)``, else t.

    That is where the costs of the two branches z <= 0 and z >= 0 cross.

    Reference: Zhang et al. 2015, arXiv:1505.06798, equations 9 to 11.
    """

    def apply(self, t: Samples, out: Samples) -> None:
        np.maximum(t, 0, out=out)

    def step(self, t: Samples, target: Samples, penalty: float, out: Samples, work: Samples) -> None:
        np.multiply(target, -_reach(penalty), out=work)
        moved = t > work
        np.subtract(target, t, out=out)
        out *= moved
        out *= 1 / (1 + penalty)


class _Relu6:
    """As `_Relu`, and t again above ``6 + (6 - a) (sqrt(1 + 1 / penalty) - 1)``, by symmetry."""

    def apply(self, t: Samples, out: Samples) -> None:
        np.clip(t, 0, 6, out=out)

    def step(self, t: Samples, target: Samples, penalty: float, out: Samples, work: Samples) -> None:
        reach = _reach(penalty)
        np.multiply(target, -reach, out=work)
        moved = t > work
        work += 6 + 6 * reach
        moved &= t < work
        np.subtract(target, t, out=out)
        out *= moved
        out *= 1 / (1 + penalty)


class _Leaky:
    """Slope s below zero: the better of the branches z >= 0 and z <= 0, each a parabola cut at zero."""

    def __init__(self, slope: float | Samples) -> None:
        self._slope = np.asarray(slope)

    def apply(self, t: Samples, out: Samples) -> None:
        np.multiply(t, self._slope.astype(t.dtype), out=out)
        np.copyto(out, t, where=t > 0)

    def step(self, t: Samples, target: Samples, penalty: float, out: Samples, work: Samples) -> None:
        s = self._slope.astype(t.dtype)
        up = np.maximum((target + penalty * t) / (1 + penalty), 0)
        down = np.minimum((s * target + penalty * t) / (s * s + penalty), 0)
        up_cost = (target - up) ** 2 + penalty * (up - t) ** 2
        down_cost = (target - s * down) ** 2 + penalty * (down - t) ** 2
        np.subtract(np.where(up_cost < down_cost, up, down), t, out=out)


def _activation(name: str, slope: float | Samples | None, d: int) -> _Activation:
    if name in ("leaky", "prelu"):
        if slope is None or np.shape(slope) not in ((), (d,)):
            raise ValueError(f'activation "{name}" needs a slope: a number, or one for each of {d} channels')
        return _Leaky(slope)
    plain: dict[str, _Activation] = {"relu": _Relu(), "relu6": _Relu6(), "none": _Leaky(1.0)}
    if name not in plain:
        raise ValueError(f'activation "{name}" is none of {", ".join([*plain, "leaky", "prelu"])}')
    if slope is not None:
        raise ValueError(f'activation "{name}" has no slope')
    return plain[name]


def _reach(penalty: float) -> float:
    """How far below zero t may lie, a unit of target, for the branch above to be the better one."""
    return math.sqrt(1 + 1 / penalty) - 1


def _squares(values: Samples) -> float:
    flat = values.ravel()
    return float(flat @ flat)


def _moments(data: _Data) -> Moments:
    """Moments of the features with what they are to predict, the responses less the shortcut."""
    moments = Moments(data.features.shape[1], data.responses.shape[1])
    chunk = max(1, _CHUNK_NUMBERS // data.responses.shape[1])
    for start in range(0, len(data.features), chunk):
        part = data.rows(slice(start, start + chunk))
        wanted = part.responses if part.shortcut is None else part.responses - part.shortcut
        moments.add(part.features, wanted)
    return moments


def _divide(F: Samples, Y: Samples, options: Options) -> tuple[_Data, _Data | None]:
    """Samples to fit to, samples to judge by."""
    data = _checked(F, Y, options.get("shortcut"))
    holdout = options.get("holdout")
    if holdout is None:
        return data, None
    if isinstance(holdout, tuple):
        given = _checked(*holdout, *([None] if len(holdout) == 2 else []))
        if [part is None or part.shape[1] for part in given] != [p is None or p.shape[1] for p in data]:
            raise ValueError("held-out samples have other variables than the samples")
        return data, given
    kept = len(F) - round(holdout * len(F))
    if not 0 < kept < len(F):
        raise ValueError(f"a held-out share of {holdout:g} of {len(F)} samples leaves a side without any")
    return data.rows(slice(0, kept)), data.rows(slice(kept, None))


def _checked(F: Samples, Y: Samples, shortcut: Samples | None) -> _Data:
    if F.ndim != 2 or Y.ndim != 2 or len(F) != len(Y) or not F.size or not Y.size:
        raise ValueError(f"samples of shapes {F.shape} and {Y.shape}: expected (n, m) and (n, d), n > 0")
    if shortcut is not None and shortcut.shape != Y.shape:
        raise ValueError(f"shortcut of shape {shortcut.shape}: expected {Y.shape}")
    return _Data(F, Y, shortcut)


def _check_schedule(phases: Sequence[tuple[float, int]], parts: int) -> None:
    if parts < 1:
        raise ValueError(f"{parts} parts: at least 1")
    for penalty, iterations in phases:
        if not penalty > 0 or iterations < 0:
            raise ValueError(f"phase ({penalty:g}, {iterations}): lambda must be positive, iterations >= 0")
