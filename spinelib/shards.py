"""Large synthetic training cohorts: scans and curves only, packed in files of a few hundred people.

A record of `spinelib.data` holds all that evaluation needs of a person (MRI, masks, volume) in files anyone can
open; twenty thousand of them would be 30 GB and an hour of small reads. Training needs the DXA and the curves. A
shard holds those of `SHARD` people in one safetensors file, read by memory mapping, so that a cohort larger than
memory trains at the speed of the disk.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import torch
from joblib import Parallel, delayed
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from spinelib.data import keep_freed_memory
from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection
from spinelib.models.datasets import CurveExample
from spinelib.phantom.cohort import DXA_SPACING_MM, render_dxa
from spinelib.phantom.population import describe, sample_subject
from spinelib.record import written_atomically
from spinelib.spine import Curves

SHARD = 256
"""People in a file: 90 MB, a few minutes of rendering on one core."""

_EXTENDED_ROWS = 300
_SEED_STRIDE = 1_000_000


class ShardedCohort(Sequence):
    """The examples of a folder of shards, read when asked for.

    Parameters
    ----------
    folder : path
        Made by `render_shards`.
    limit : int
        At most so many examples, 0 = all.
    """

    def __init__(self, folder, limit: int = 0):
        self.paths = sorted(Path(folder).glob("shard-*.safetensors"))
        if not self.paths:
            message = (
                f"no shards in {folder}. Make them with: spinelib train --shards {folder} --render 2000 -o weights"
            )
            raise InputError(message)
        self._files = [safetensors.safe_open(path, framework="np") for path in self.paths]
        self._lengths = [file.get_slice("origin_mm").get_shape()[0] for file in self._files]
        total = sum(self._lengths)
        self._length = min(limit, total) if limit else total
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Part(self, range(*index.indices(len(self))))
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, place = self._files[shard], index - int(self._starts[shard])
        part = {name: file.get_slice(name)[place : place + 1][0] for name in _FIELDS}
        grid = PlanarGrid("coronal", part["dxa"].shape[1:], DXA_SPACING_MM, tuple(map(float, part["origin_mm"])))
        dxa = Projection(("bone", "tissue"), part["dxa"].astype(np.float32), grid)
        key = f"{self.paths[shard].stem}-{place:03d}"
        return CurveExample(key, dxa, _unpacked(part["curves"]), _unpacked(part["extended"]))

    def people(self) -> pd.DataFrame:
        """Return what is known of each person (sex, age, angles, ...), one row an example."""
        tables = [pd.DataFrame(json.loads(file.metadata()["people"])) for file in self._files]
        return pd.concat(tables, ignore_index=True).head(len(self))


class _Part(Sequence):
    """A slice of a cohort, still read when asked for."""

    def __init__(self, cohort, places):
        self.cohort, self.places = cohort, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Part(self.cohort, self.places[index])
        return self.cohort[self.places[index]]


_FIELDS = ("dxa", "origin_mm", "curves", "extended")


def render_shards(
    folder, subjects: int, *, seed: int, mix: str = "enriched", n_jobs: int = 2, device: str = "cpu"
) -> ShardedCohort:
    """Render (or complete) a training cohort and return it; whole shards, each written once.

    Parameters
    ----------
    folder : path
    subjects : int
        Rounded up to whole shards.
    seed : int
        Person i of a cohort is that of the same number in `spinelib.data.synthetic_cohort`: use a seed whose
        people are not tested on.
    mix : str
        See `spinelib.phantom.population.sample_subject`.
    n_jobs : int
        Processes; with device 'cuda' they share the GPU.
    device : str
        Where bones and tissue are sampled.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [i for i in range(-(-subjects // SHARD)) if not _path(folder, seed, i).is_file()]
    jobs = (delayed(_make_shard)(folder, seed, i, mix, device) for i in numbers)
    results = Parallel(n_jobs=n_jobs, return_as="generator_unordered")(jobs)
    for _ in tqdm(results, total=len(numbers), desc="shards", unit="shard", disable=not sys.stderr.isatty()):
        pass
    return ShardedCohort(folder, subjects)


def _path(folder, seed, number):
    return folder / f"shard-{seed}-{number:05d}.safetensors"


def _make_shard(folder, seed, number, mix, device):
    torch.set_num_threads(1)
    keep_freed_memory()
    rendered, failed = [], []
    for i in range(number * SHARD, (number + 1) * SHARD):
        try:
            rendered.append(_person(int(seed) * _SEED_STRIDE + i, mix, device))
        except Exception as error:  # whatever it was, it must cost one subject, not the shard
            failed.append({"index": i, "reason": f"{type(error).__name__}: {error}"})
    arrays, people = zip(*rendered, strict=True)
    packed = {name: np.ascontiguousarray(np.stack([a[name] for a in arrays])) for name in _FIELDS}
    path = _path(folder, seed, number)
    about = {"people": json.dumps(people), "failed": json.dumps(failed)}
    written_atomically(path, [".safetensors"], partial(save_file, packed, metadata=about))


def _person(seed, mix, device):
    subject = sample_subject(seed, curves=mix)
    dxa, curves, extended = render_dxa(subject, device=device)
    person = {k: (v.item() if hasattr(v, "item") else v) for k, v in describe([subject]).iloc[0].items()}
    arrays = {
        "dxa": dxa.values.astype(np.float16),
        "origin_mm": np.array(dxa.grid.origin_mm, np.float64),
        "curves": _packed(curves),
        "extended": _packed(extended.resample(_EXTENDED_ROWS)),
    }
    return arrays, person


def _packed(curves):
    return np.column_stack([curves.heights_mm, curves.to_array()]).astype(np.float32)


def _unpacked(rows):
    return Curves.from_array(rows[:, 0].astype(float), rows[:, 1:].astype(float))
