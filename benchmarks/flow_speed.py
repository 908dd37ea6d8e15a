"""Latency of WtFlow's scores compared with the backbone and FastFlow, and the time of its coupling in training.

Run as ``python -m benchmarks.flow_speed``, on an otherwise idle machine. It uses the embedded category.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import openvino
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from anomalib_ot.comparison import median_seconds
from anomalib_ot.features.backbones import create_extractor
from anomalib_ot.features.extraction import FLOAT32
from anomalib_ot.features.store import FeatureDataset
from anomalib_ot.host.feature_cache import feature_loader
from anomalib_ot.offline import offline_backbone
from anomalib_ot.transport import WorstCoupling

from .categories import EMBEDDED, open_category
from .wt_flow import IMAGE_SIZE, LAYER, LAYERS, SCORES, OnFeatures, cached, fast_flow_model, in_parts, metrics, trainer

BLOCKS = (64, 128, 256, 1024)


def main(threads: int = 2, seed: int = 0, steps: int = 200) -> None:
    """Print three tables.

    Args:
        threads: Number of threads for torch.
        seed: Random seed.
        steps: Training steps.
    """
    torch.set_num_threads(threads)
    backbone = offline_backbone()
    data = open_category(EMBEDDED)
    train, *_ = cached(map(data.train_data.__getitem__, range(len(data.train_data))), backbone)
    test, labels, masks = cached(map(data.test_data.__getitem__, range(len(data.test_data))), backbone)
    seed_everything(seed, workers=True, verbose=False)
    model = OnFeatures(backbone, [LAYER], training_steps=steps)
    model.features = train

    def auroc() -> float:
        return metrics(*in_parts(model.model.eval(), test[LAYER]), labels, masks)["image_AUROC"]

    watch = Stopwatch(auroc)
    trainer(model, callbacks=[watch]).fit(model, feature_loader(FeatureDataset(train), 1))
    print("steps: seconds of training, image AUROC")
    print("\n".join(f"{count:5}: {seconds:5.1f} s, {value:.1f}" for count, seconds, value in watch.seen))
    coupling(model, watch.seen[-1][1] / steps)
    latency(model, backbone, train)


class Stopwatch(Callback):
    """Image AUROC of the averaged weights every 25 steps, with the seconds of training only.

    Args:
        auroc: Measures the image AUROC.
    """

    def __init__(self, auroc: Callable[[], float]) -> None:
        self.auroc = auroc
        self.seen: list[tuple[int, float, float]] = []
        self.seconds = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        """Stop the clock, and measure every 25 steps."""
        self.seconds += time.perf_counter() - self.start
        if trainer.global_step % 25 == 0:
            self.seen.append((trainer.global_step, self.seconds, self.auroc()))
            module.train()


def coupling(model: OnFeatures, step: float) -> None:
    """Time of a training step and of worst couplings of positions, and the gap of greedy ones."""
    with torch.no_grad():
        data = model.model.embed({LAYER: model.features[LAYER][: model.batch_size]})[0]
    noise = torch.randn_like(data)
    print(f"a training step of {len(data)} maps {tuple(data.shape[1:])}: {1000 * step:.0f} ms; coupling of positions:")
    for block in BLOCKS:
        for solver in ("exact", "greedy"):
            pairs = WorstCoupling("positions", block, solver)
            seconds = median_seconds(lambda pairs=pairs: pairs(data, noise), 5)
            cosine = float(torch.cosine_similarity(data.flatten(), pairs(data, noise).flatten(), dim=0))
            print(
                f"blocks of {block:4}, {solver:6}: {1000 * seconds:6.1f} ms, gap {pairs.gap(data, noise):.3f}, "
                f"cosine {cosine:.3f}"
            )


def latency(model: OnFeatures, backbone: str, train: dict[str, Tensor]) -> None:
    """Milliseconds per image, with and without the backbone, in torch and in OpenVINO."""
    print("network: torch, OpenVINO, ms per image (without its backbone)")
    image = torch.rand(1, 3, *IMAGE_SIZE)
    alone: dict[tuple[str, ...], tuple[float, float]] = {}
    for name, layers, network in networks(model, backbone, train):
        if layers not in alone:
            alone[layers] = both(create_extractor(backbone, layers), image)
            print(f"backbone to {layers[-1]}, {len(layers)} layers: " + ", ".join(f"{t:.1f}" for t in alone[layers]))
        times = both(network, image)
        print(f"{name}: " + ", ".join(f"{t:.1f} ({t - b:.1f})" for t, b in zip(times, alone[layers], strict=True)))


def networks(
    model: OnFeatures, backbone: str, train: dict[str, Tensor]
) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """Name, layers and network (from images to the anomaly map) of each model."""
    for score in SCORES:
        model.model.settings = replace(model.model.settings, score=score)
        yield f"WtFlow, {score}", (LAYER,), Maps(model.model)
    fast_flow = fast_flow_model([each.shape[1] for each in train.values()], [each.shape[-1] for each in train.values()])
    fast_flow.feature_extractor = Listed(create_extractor(backbone, LAYERS))
    yield "FastFlow", LAYERS, Maps(fast_flow)


class Maps(nn.Module):
    """A network that returns only its anomaly map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, h, w) to anomaly maps (B, 1, h, w)."""
        return self.network(images).anomaly_map


class Listed(nn.Module):
    """An extractor that returns its layers as a list."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, h, w) to a feature map (B, D, H, W) for each layer."""
        return list(self.extractor(images).values())


@torch.inference_mode()
def both(network: nn.Module, image: Tensor) -> tuple[float, float]:
    """Milliseconds in torch and in OpenVINO."""
    in_torch = median_seconds(lambda: network(image))
    with torch.inference_mode(mode=False):
        program = torch.export.export(network.eval(), (image.clone(),))
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", FLOAT32)
    array = image.numpy().astype(np.float32)
    return 1000 * in_torch, 1000 * median_seconds(lambda: compiled(array))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
