"""What was measured, as a file: for each machine, the time of each chain of convolutions in each place.

One line a measurement, in milliseconds, with its noise and the number of runs behind it; people can read it,
copy it and remove it. Measurements of other machines stay in it untouched.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto import runtime
from caffe_proto.errors import FileError, PlanError
from caffe_proto.files import writing
from caffe_proto.plan import read_json
from caffe_proto.runtime import Engine

from .decomposition import StepShape

VERSION = 1
_HEAD = "caffe-lra latencies"
_PERIOD = 4  # blocks of output channels that a kernel takes at once
_CPUINFO = Path("/proc/cpuinfo")

Chain = tuple[StepShape, ...]


@dataclass(frozen=True)
class Measured:
    """``seconds``: the median; ``noise``: its relative standard error; ``runs`` behind it."""

    seconds: float
    noise: float
    runs: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Measured:
        """From samples in seconds: ``noise = 1.2533 * 1.4826 MAD / (median sqrt(n))``, as for normal scatter."""
        middle = float(np.median(samples))
        spread = 1.4826 * float(np.median(np.abs(np.asarray(samples) - middle)))
        noise = 1.2533 * spread / (middle * len(samples) ** 0.5) if middle > 0 else 0.0
        return cls(middle, noise, len(samples))


def conditions(engine: Engine) -> dict[str, Any]:
    """What a time belongs to: processor, release of onnxruntime, threads, provider."""
    return {
        "processor": processor(),
        "onnxruntime": runtime.onnxruntime.__version__,
        "threads": engine.threads or os.cpu_count() or 1,
        "provider": engine.provider,
    }


def machine(engine: Engine) -> str:
    """What a time belongs to, as the table names it."""
    here = conditions(engine)
    return f"{here['processor']}; onnxruntime {here['onnxruntime']}; threads {here['threads']}; {here['provider']}"


def processor() -> str:
    """The processor's model, as exactly as the system names it."""
    if not _CPUINFO.is_file():
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    numbers = [found[key] for key in ("cpu family", "model", "stepping") if key in found]
    return " ".join(filter(None, [found.get("model name", platform.machine()), "/".join(numbers)]))


def default_path() -> Path:
    """The table in the user's folder for caches."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "caffe-lra" / "latencies.json"


def describe(chain: Sequence[StepShape]) -> str:
    """A chain as the table writes it: ``128 -> 48 3x1 pad 1,0; 48 -> 256 1x3 pad 0,1``."""
    return "; ".join(map(_step, chain))


def _step(step: StepShape) -> str:
    out, depth, *kernel = step.shape
    words = [f"{depth * step.group} -> {out} {kernel[0]}x{kernel[1]}"]
    for word, pair, usual in (
        ("stride", step.stride, 1),
        ("pad", step.pad, 0),
        ("dilation", step.dilation, 1),
    ):
        if pair != (usual, usual):
            words.append(f"{word} {pair[0]},{pair[1]}")
    if step.group != 1:
        words.append(f"group {step.group}")
    return " ".join(words)


@dataclass
class Table:
    """The measurements of one machine. ``block``: channels that its kernels take at once, 0 where not known.

    ``nets``: whole nets as they are, by the hash of their graph; ``layers``: place -> chain -> time.
    """

    machine: str
    path: Path
    block: int = 0
    nets: dict[str, Measured] = field(default_factory=dict)
    layers: dict[str, dict[str, Measured]] = field(default_factory=dict)

    @classmethod
    def load(cls, machine: str, path: Path) -> Table:
        """What a file holds of a machine; nothing where there is no file. Raises FileError where it is no table."""
        entry = _read(path).get(machine, {})
        try:
            layers = {
                place: {chain: _measured(value) for chain, value in chains.items()}
                for place, chains in entry.get("layers", {}).items()
            }
            nets = {net: _measured(value) for net, value in entry.get("nets", {}).items()}
            return cls(machine, path, int(entry.get("block", 0)), nets, layers)
        except (AttributeError, TypeError, ValueError) as error:
            raise _refused(f"holds a measurement that is none: {error}", path) from None

    def get(self, place: str, chain: Sequence[StepShape]) -> Measured | None:
        """The time of a chain in a place, None where it was not measured."""
        return self.layers.get(place, {}).get(describe(chain))

    def put(self, place: str, chain: Sequence[StepShape], measured: Measured) -> None:
        """Note a time."""
        self.layers.setdefault(place, {})[describe(chain)] = measured

    def write(self) -> None:
        """Add these measurements to the file, over older ones of the same machine; others stay.

        Raises FileError where the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot be made: {error.strerror or error}", path=self.path.parent) from error
        machines = dict(_read(self.path))
        before = Table.load(self.machine, self.path)
        layers = {**before.layers}
        for place, chains in self.layers.items():
            layers[place] = {**layers.get(place, {}), **chains}
        machines[self.machine] = {
            "block": self.block or before.block,
            "nets": {net: _listed(one) for net, one in {**before.nets, **self.nets}.items()},
            "layers": {
                place: {chain: _listed(one) for chain, one in chains.items()}
                for place, chains in layers.items()
            },
        }
        unit = "[milliseconds, noise, runs]"
        text = _text({_HEAD: VERSION, "unit": unit, "machines": machines})
        with writing([self.path]) as (temporary,):
            temporary.write_text(f"{text}\n", encoding="utf-8")


def _read(path: Path) -> Mapping[str, Any]:
    """The machines of a file."""
    if not path.exists():
        return {}
    try:
        value = read_json(path.read_text(encoding="utf-8"), path)
    except PlanError as error:
        raise _refused(error.message, path, error.line) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(f"cannot be read: {error}", path) from error
    machines = value.get("machines")
    if value.get(_HEAD) != VERSION or not isinstance(machines, dict):
        raise _refused(f"is no table of latencies of version {VERSION}", path)
    if not all(isinstance(entry, dict) for entry in machines.values()):
        raise _refused("holds a machine that is no object", path)
    return machines


def _refused(message: str, path: Path, line: int | None = None) -> FileError:
    return FileError(message, path=path, line=line, hint="remove it: it is then measured anew")


def _measured(value: Any) -> Measured:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{value!r} is not [milliseconds, noise, runs]")
    milliseconds, noise, runs = (float(one) for one in value)
    if not 0 < milliseconds < float("inf") or not 0 <= noise < float("inf"):
        raise ValueError(f"{value!r} is not [milliseconds, noise, runs]")
    return Measured(milliseconds / 1e3, noise, int(runs))


def _listed(one: Measured) -> list[float]:
    return [float(f"{1e3 * one.seconds:.5g}"), float(f"{one.noise:.2g}"), one.runs]


def _text(value: Any, indent: str = "") -> str:
    """JSON with one line for whatever is no object."""
    if not isinstance(value, dict) or not value:
        return dumps(value)
    inner = ",\n".join(f"{indent} {dumps(key)}: {_text(one, indent + ' ')}" for key, one in value.items())
    return f"{{\n{inner}\n{indent}}}"


def grid(top: int) -> list[int]:
    """Which of 1 ... ``top`` blocks to measure: all of the first two periods, ends of periods, and ``top``."""
    ends = [_PERIOD * n for n in (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48)]
    while ends[-1] < top:
        ends.append(ends[-1] + 16 * _PERIOD)
    return sorted({n for n in (*range(1, 2 * _PERIOD + 1), *ends, top) if 1 <= n <= top})


def interpolate(points: Mapping[int, float], blocks: int) -> float:
    """Time at a number of blocks between those measured: a straight line, and what a started period adds.

    ``t(n) = line(n) + e(n mod 4)`` with ``e(j) = t(4 + j) - line(4, 8)``: a kernel takes four blocks of output
    channels at once, what is left over costs nearly the same however many came before. Not monotone.

    Raises:
        ValueError: outside the measured points.
    """
    if blocks in points:
        return points[blocks]
    if not min(points) < blocks < max(points):
        raise ValueError(f"{blocks} blocks are outside {min(points)} to {max(points)}")
    excess = _excess(points)
    flat = {n: t - excess[n % _PERIOD] for n, t in points.items()}
    low, high = next((a, b) for a, b in pairwise(sorted(flat)) if a < blocks < b)
    share = (blocks - low) / (high - low)
    return flat[low] + share * (flat[high] - flat[low]) + excess[blocks % _PERIOD]


def _excess(points: Mapping[int, float]) -> list[float]:
    """What 0 ... 3 blocks of a started period cost above the line, from the second period; 0 where it was not measured."""
    if not all(n in points for n in range(_PERIOD, 2 * _PERIOD + 1)):
        return [0.0] * _PERIOD
    start, slope = points[_PERIOD], (points[2 * _PERIOD] - points[_PERIOD]) / _PERIOD
    return [points[_PERIOD + j] - start - j * slope for j in range(_PERIOD)]
