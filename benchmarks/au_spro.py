"""PRO and AU-sPRO from histograms compared with implementations that store all maps: time, memory and values.

Run as ``python -m benchmarks.au_spro``, with ``--root DATA`` to add a category in the layout of MVTec LOCO AD to the
synthetic maps. The references are anomalib's ``AUPRO`` for ``PROCurve``, with the same regions, and an exact sPRO that
sorts all scores for ``AUSPRO``. Each runs in a separate process. The time is that of the metric only. It includes
reading masks for sPRO, but not making or reading maps. The memory is what the metric adds to the process at its peak.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn.functional import interpolate

from anomalib_ot.data import LOCODataset, image_defects
from anomalib_ot.metrics import AUSPRO, PROCurve

from .versions import versions
from .watch import peak_memory, timed

LIMIT = 0.3
KINDS = ("logical_anomalies", "structural_anomalies")


@dataclass(frozen=True)
class Maps:
    """Maps that are made one at a time; each depends only on its index and the seed.

    Attributes:
        count: Number of synthetic maps.
        size: Height and width of the synthetic maps.
        category: Folder of a category whose test images get maps instead.
        seed: Seed of the maps.
    """

    count: int
    size: tuple[int, int]
    category: Path | None
    seed: int

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batches of one image; every second synthetic map has two defects."""
        for number, (mask, path) in enumerate(self._masks() if self.category is None else self._images(self.category)):
            noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(self.seed + number))
            scores = interpolate(noise, mask.shape, mode="bicubic")[0] + mask * noise.std()
            yield ImageBatch(
                image=torch.zeros(1, 3, *mask.shape), anomaly_map=scores, gt_mask=mask[None], image_path=[path]
            )

    def _masks(self) -> Iterator[tuple[Tensor, str]]:
        for number in range(self.count):
            mask = torch.zeros(self.size, dtype=torch.bool)
            if number % 2:
                height, width = (side // 8 for side in self.size)
                mask[height : 2 * height, number % width :][:, :width] = True
                mask[5 * height : 7 * height, 4 * width :][:, : 2 * width] = True
            yield mask, ""

    @staticmethod
    def _images(category: Path) -> Iterator[tuple[Tensor, str]]:
        for item in LOCODataset(category, "test"):
            yield item.gt_mask.bool(), item.image_path


class SortedSPRO:
    """Exact sPRO, which stores all scores and sorts them at the end."""

    def __init__(self) -> None:
        self.scores: dict[str, list[Tensor]] = {kind: [] for kind in ("good", *KINDS)}
        self.overlaps: dict[str, list[Tensor]] = {kind: [] for kind in ("good", *KINDS)}

    def update(self, batch: ImageBatch) -> None:
        """Store the scores of an image and each pixel's contribution to the overlap, -1 for defect-free pixels."""
        path = Path(batch.image_path[0])
        defects, scores = image_defects(path), batch.anomaly_map[0].flatten()
        shares = torch.zeros(len(scores), dtype=torch.float64)
        for mask, area in zip(defects.masks.flatten(1), defects.saturation.tolist(), strict=True):
            pixels = mask.nonzero()[:, 0]
            shares[pixels[scores[pixels].topk(int(area)).indices]] += 1 / area
        shares[defects.masks.sum(0).flatten() == 0] = -1
        self.scores[path.parent.name].append(scores)
        self.overlaps[path.parent.name].append(shares)

    def compute(self) -> float:
        """Mean area over the kinds of anomalies."""
        return sum(self._area(kind) for kind in KINDS) / len(KINDS)

    def _area(self, kind: str) -> float:
        scores = torch.cat(self.scores["good"] + self.scores[kind])
        shares = torch.cat(self.overlaps["good"] + self.overlaps[kind])
        scores, order = scores.sort(descending=True)
        shares = shares[order]
        last = torch.cat([scores.diff() != 0, torch.ones(1, dtype=torch.bool)])
        curve = torch.stack([(shares < 0).double(), shares.clamp(min=0)]).cumsum(1)[:, last]
        rate, overlap = curve / curve[:, -1:]
        # The curve starts at the origin, and the part of a step beyond the limit is cut off.
        rate, overlap = (torch.cat([torch.zeros(1, dtype=torch.float64), values]) for values in (rate, overlap))
        inside = int((rate <= LIMIT).sum())
        weight = (LIMIT - rate[inside - 1]) / (rate[inside] - rate[inside - 1])
        end = overlap[inside - 1].lerp(overlap[inside], weight)
        rate, overlap = torch.cat([rate[:inside], rate.new_tensor([LIMIT])]), torch.cat([overlap[:inside], end[None]])
        return float(torch.trapezoid(overlap, rate)) / LIMIT


class AreaOfPROCurve:
    """The area under a PRO curve, updated like anomalib's metrics."""

    def __init__(self) -> None:
        self.curve = PROCurve(LIMIT)

    def update(self, batch: ImageBatch) -> None:
        """Add a batch."""
        self.curve.update(batch.anomaly_map, batch.gt_mask)

    def compute(self) -> Tensor:
        """Area under the curve."""
        return self.curve.area()


def main(
    maps: tuple[int, ...] = (100, 1000),
    size: tuple[int, int] = (512, 512),
    reference_maps: int = 100,
    root: Path | None = None,
    category: str = "tray/breakfast_box",
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Print a line for each implementation, and the ratios to the reference.

    Args:
        maps: Numbers of synthetic maps.
        size: Height and width of the synthetic maps.
        reference_maps: Largest number of maps for the references, which store all maps.
        root: Folder of the categories; by default only synthetic maps are used.
        category: Category in this folder, in the layout of MVTec LOCO AD.
        threads: Number of threads for torch.
        seed: Seed of the maps.
    """
    packages = versions("anomalib-ot", "anomalib", "torch")
    print(f"{packages}, {threads} threads, seed {seed}, FPR up to {LIMIT}")
    for count in maps:
        print(f"{count} synthetic maps of {size[0]} x {size[1]}")
        source = Maps(count, size, None, seed)
        compare([aupro, pro_curve] if count <= reference_maps else [pro_curve], source, threads)
    if root is not None:
        print(f"test images of {category}")
        source = Maps(0, size, root / category, seed)
        compare([aupro, pro_curve], source, threads)
        compare([sorted_spro, au_spro], source, threads)


Metric = AUPRO | AUSPRO | AreaOfPROCurve | SortedSPRO


def aupro() -> Metric:
    """The AUPRO of anomalib."""
    return AUPRO(fields=("anomaly_map", "gt_mask"), fpr_limit=LIMIT)


def pro_curve() -> Metric:
    """The area under our PRO curve."""
    return AreaOfPROCurve()


def sorted_spro() -> Metric:
    """The exact AU-sPRO."""
    return SortedSPRO()


def au_spro() -> Metric:
    """Our AU-sPRO."""
    return AUSPRO(fpr_limit=LIMIT)


def compare(create: Sequence[Callable[[], Metric]], source: Maps, threads: int) -> None:
    """Print area, time and memory of each metric, and the ratios of a reference to ours if there are two."""
    rows = []
    for function in create:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            area, seconds, memory = pool.submit(measured, function, source).result()
        print(f"  {function.__name__:12} area {area:.5f}, {seconds:6.2f} s, {memory:6.3f} GB", flush=True)
        rows.append((seconds, memory))
    if len(rows) > 1:
        (seconds, memory), (our_seconds, our_memory) = rows
        print(f"  {'ratio':12} {seconds / our_seconds:.1f} in time, {memory / our_memory:.1f} in memory")


def measured(create: Callable[[], Metric], source: Maps) -> tuple[float, float, float]:
    """Area, time in seconds and added memory in GB of a metric."""
    # The memory for making a map does not count.
    next(iter(source))
    before = peak_memory()
    metric = create()
    seconds = 0.0
    for batch in source:
        seconds += timed(partial(metric.update, batch))[1]
    area, passed = timed(metric.compute)
    return float(area), seconds + passed, peak_memory() - before


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
