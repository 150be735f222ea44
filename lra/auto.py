"""Which treatment of which layer harms the outputs least: measured, not assumed.

For every layer the relative error of its responses after a linear fit is known at all ranks of several schemes,
from moments alone. How much such an error harms the net's outputs differs from layer to layer by an order of
magnitude: it is measured by replacing one layer at a time at a few ranks. The sum over layers of the output error
so predicted is what the ranks minimise within the budget. It is right for small errors; a small share of the
energy measure of Zhang et al. keeps ranks from collapsing where errors are large and no longer add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from . import jobs, options
from . import ranks as policy
from .calibration import Calibration
from .decomposition import Decomposition
from .linalg import AffineMap, from_moments
from .ranks import Option
from .responses import Job, Ticks
from .schemes import asymmetric3d, response, spatial
from .stats import Moments
from .targets import Found, Spectra, Target

Array = NDArray[np.float64]

ENERGY_SHARE = 0.05  # of -log of the energy, in the loss
PROBED = (0.4, 0.1, 0.02)  # relative errors of responses near which the harm is measured
PROBE_IMAGES = (24, 128)  # at least and at most, the last ones
PROBE_PASSES = 4  # over the images, at most, that probing may cost beyond the least
_LEAST, _MOST = 1e-9, 1 - 1e-9
_GRID = 24  # ranks d'' at which the error of asymmetric 3-D is computed; between them it is interpolated


@dataclass(frozen=True, eq=False)
class Errors:
    """Relative squared errors of a layer's responses after a linear fit, at components a group.

    ``pair`` (R,): of H behind V; ``low`` (d,): of the channel scheme; ``both`` (R, d): of asymmetric 3-D. A layer
    with nothing to separate has no ``pair`` and ``both``.
    """

    low: Array
    pair: Array | None = None
    both: Array | None = None


class Study:
    """What was measured of the layers of one net."""

    def __init__(
        self, found: Found, spectra: Spectra, calibration: Calibration, targets: Sequence[Target], step: Ticks
    ) -> None:
        walker = calibration.walker(found)
        samples = walker.sample(targets, calibration.stage, calibration.key(found), step)
        starts = {target.name: _start(target, spectra) for target in targets}
        moments = walker.moments(list(starts.values()), samples, step)

        def linear(target: Target) -> tuple[Errors, list[Decomposition], Array]:
            name, scale = target.name, walker.behind(target).scale
            fit = _Linear(target, starts[name], moments[name], scale, samples[name].responses)
            errors = fit.errors()
            return errors, *fit.probes(errors)

        peers = walker.shared.peers
        fits = {target.name: peers.told(partial(linear, target)) for target in targets}
        self.errors: dict[str, Errors] = {name: errors for name, (errors, _, _) in fits.items()}
        probes = {name: chains for name, (_, chains, _) in fits.items()}
        self._probed: dict[str, Array] = {name: probed for name, (_, _, probed) in fits.items()}
        least, most = PROBE_IMAGES
        fair = PROBE_PASSES * walker.n_images // max(1, sum(map(len, probes.values())))
        sub = walker.last(min(walker.n_images, max(least, min(most, fair))))
        found_errors = sub.output_errors(probes, targets, step)
        self._harm = {name: np.maximum(errors, _LEAST) for name, errors in found_errors.items()}

    def harm(self, target: Target, error: Array) -> Array:
        """Predicted relative squared error of the outputs where a layer's responses have a relative one."""
        known, harm = np.log(self._probed[target.name]), np.log(self._harm[target.name])
        factor = np.interp(np.log(np.maximum(error, _LEAST)), known, harm - known)
        return np.asarray(error * np.exp(factor))

    def loss(self, target: Target, error: Array) -> Array:
        """What allocation minimises the sum of."""
        energy = policy.loss(1 - np.minimum(error, _MOST))
        return np.asarray(self.harm(target, error) + ENERGY_SHARE * energy)

    def error(self, target: Target, scheme: str, ranks: tuple[int, ...]) -> float:
        """Relative squared error of a layer's responses by a treatment that `options` offers."""
        found, group = self.errors[target.name], target.geometry.group
        at = [rank // group - 1 for rank in ranks]
        if scheme == response.RESPONSE.name or found.pair is None or found.both is None:
            return float(found.low[at[0]])
        return float(found.pair[at[0]] if len(at) == 1 else found.both[at[0], at[1]])

    def options(self, target: Target, round_to: int, scheme: str | None = None) -> list[Option]:
        """Leaving a layer alone, and every treatment of it that is cheaper; by one scheme, or by any."""
        found, group = self.errors[target.name], target.geometry.group
        made = [Option(float(target.macs), 0.0, None)]
        if scheme in (None, response.RESPONSE.name):
            made += options.singles(target, response.RESPONSE, round_to, self.loss(target, found.low))
        if found.pair is None or found.both is None:
            return made
        pair = self.loss(target, found.pair)
        if scheme in (None, spatial.SPATIAL.name):
            made += options.singles(target, spatial.SPATIAL, round_to, pair)
        losses, whole, reach = self.loss(target, found.both), target.shape[0] // group, len(pair)
        merged = np.full_like(pair, np.inf) if scheme is None else pair  # one of any is the spatial scheme's

        def loss(inner: NDArray[np.intp], outer: NDArray[np.intp]) -> Array:
            at = np.minimum(inner, reach) - 1
            return np.where(
                inner <= reach, np.where(outer == whole, merged[at], losses[at, outer - 1]), np.inf
            )

        if scheme in (None, asymmetric3d.ASYMMETRIC_3D.name):
            made += options.pairs(target, round_to, loss, same=False)
        return made


def _start(target: Target, spectra: Spectra) -> Job:
    """V at the largest rank that pays, and H behind it; for a 1 x 1 kernel the responses themselves."""
    if _flat(target):
        return jobs.response_job(target, spectra.found, target.shape[0])
    spectrum = spectra.get(target, spatial.SPATIAL)
    grid = policy.candidates(spectrum.max_rank, target.geometry.group)
    cheaper = [rank for rank in grid if target.chain_cost(spatial.SPATIAL, rank) < target.macs]
    return jobs.pair_job(target, spectrum.factor(max(cheaper, default=target.geometry.group)))


def _flat(target: Target) -> bool:
    """Whether there is nothing to separate."""
    return target.shape[2:] == (1, 1)


class _Linear:
    """Linear fits of one layer at every rank, from one set of moments; group by group."""

    def __init__(
        self, target: Target, start: Job, moments: Moments, scale: Array, responses: NDArray[np.float32]
    ) -> None:
        self._target, self._start, self._scale, self._responses = target, start, scale, responses
        self._spread = float((responses.var(axis=0, dtype=np.float64) * scale**2).sum()) or 1.0
        self._taps = start.free.weight.shape[2] * start.free.weight.shape[3]
        group = target.geometry.group
        self._seen = np.split(np.arange(len(moments.mean)), group)
        self._rows = np.split(np.arange(len(moments.other_mean)), group)
        self._moments = moments

    def errors(self) -> Errors:
        """Relative errors at every rank."""
        parts = [self._explained(*which) for which in zip(self._seen, self._rows, strict=True)]
        low, pair, both = (sum(part) for part in zip(*parts, strict=True))
        if _flat(self._target):
            return Errors(self._rest(low))
        return Errors(self._rest(low), self._rest(pair), self._rest(both))

    def _rest(self, explained: Array) -> Array:
        return np.clip(1 - explained / self._spread, _LEAST, 1.0)

    def _explained(self, seen: NDArray[Any], rows: NDArray[Any]) -> tuple[Array, Array, Array]:
        """Variance of the responses of a group explained: by channel ranks, by V ranks, by both."""
        covariance = self._moments.covariance[np.ix_(seen, seen)]
        cross = self._moments.cross_covariance[np.ix_(rows, seen)] * self._scale[rows, None]
        ridge = 1e-6 * np.trace(covariance) / len(covariance) or 1.0
        factor = np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))
        G = scipy.linalg.solve_triangular(factor, cross.T, lower=True)  # (m, d)
        pair = np.square(G).sum(axis=1).reshape(-1, self._taps).sum(axis=1).cumsum()
        ranks = np.unique(np.geomspace(1, len(pair), _GRID).round().astype(int))
        known, done, gram = [], 0, np.zeros((len(rows), len(rows)))
        for rank in ranks:
            new = G[done : rank * self._taps]
            gram, done = gram + new.T @ new, rank * self._taps
            known.append(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0).cumsum())
        table, all_ranks = np.stack(known), np.arange(1, len(pair) + 1)
        both = np.stack([np.interp(all_ranks, ranks, column) for column in table.T], axis=1)
        return self._principal(rows), pair, both

    def _principal(self, rows: NDArray[Any]) -> Array:
        """Variance of the responses of a group that their leading principal components hold."""
        scaled = self._responses[:, rows] * self._scale[rows]
        values = np.linalg.eigvalsh(np.cov(scaled, rowvar=False, bias=True).reshape(len(rows), -1))
        return np.asarray(np.maximum(values[::-1], 0).cumsum())

    def probes(self, errors: Errors) -> tuple[list[Decomposition], Array]:
        """Chains whose responses have about the errors to probe, and the errors they have; ascending in error."""
        curve = errors.low if errors.pair is None else errors.pair
        ranks = sorted({int(np.abs(np.log(curve / wanted)).argmin()) + 1 for wanted in PROBED}, reverse=True)
        return [self._chain(rank, errors.pair is None) for rank in ranks], np.asarray(
            curve[np.array(ranks) - 1]
        )

    def _chain(self, rank: int, low: bool) -> Decomposition:
        """The linear fit at so many components a group."""
        group = self._target.geometry.group
        maps = []
        for seen, rows in zip(self._seen, self._rows, strict=True):
            some = seen if low else seen[: rank * self._taps]
            prior = self._start.free.weight[rows].reshape(len(rows), -1)[:, : len(some)]
            maps.append(
                from_moments(
                    self._moments.covariance[np.ix_(some, some)],
                    self._moments.cross_covariance[np.ix_(rows, some)],
                    self._moments.mean[some],
                    self._moments.other_mean[rows],
                    rank if low else None,
                    prior=prior,
                )
            )
        mapping = AffineMap(*(np.concatenate(blocks) for blocks in zip(*maps, strict=True)))
        return self._start.build(mapping) if low else jobs.cut(self._start, rank * group).build(mapping)
