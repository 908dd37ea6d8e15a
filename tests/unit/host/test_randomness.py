from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from anomalib_ot.host.randomness import why_random


class Images(Dataset):
    """Twelve constant images, and what is done with them."""

    def __init__(self, transform=None, augmentations=None, hidden=None):
        self.transform = transform
        self.augmentations = augmentations
        self._hidden = hidden
        self._images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        image = self._images[index]
        for each in (self.transform, self.augmentations, self._hidden):
            image = each(image) if each else image
        return image


def loader(dataset):
    return DataLoader(dataset, 4, collate_fn=lambda images: SimpleNamespace(image=torch.stack(images)))


class Noise(torch.nn.Module):
    def forward(self, image):
        return image + torch.rand(1, device=image.device)


class Scaled(v2.Transform):
    def transform(self, inpt, params):
        del params
        return inpt / 2


# Change too few images for two readings to differ.
RANDOM = [
    v2.RandomHorizontalFlip(0.001),
    v2.RandomApply([v2.Resize((8, 8))], 0.001),
    v2.Compose([v2.Resize((16, 16)), v2.Compose([v2.RandomErasing(0.001)])]),
    v1.Compose([v1.Resize((16, 16)), v1.RandomVerticalFlip(0.001)]),
    v2.GaussianBlur(3, sigma=(0.1, 0.1001)),
]
FIXED = [
    None,
    v2.Compose([v2.Resize((8, 8)), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]),
    v1.Compose([v1.Resize((8, 8)), v1.CenterCrop(4)]),
    v2.GaussianBlur(3, sigma=1.0),
    v2.Lambda(lambda image: image / 2),
    Scaled(),
    torch.nn.AvgPool2d(2),
]


@pytest.mark.parametrize("transform", RANDOM, ids=str)
def test_a_random_transform_is_found_wherever_it_is(transform):
    assert "the data set has a random transform" in why_random(loader(Images(transform)), None)
    assert "the pre-processor has a random transform" in why_random(loader(Images()), transform)
    assert "training images are augmented" in why_random(loader(Images(augmentations=transform)), None)
    nested = ConcatDataset([Images(), Subset(Images(transform), range(3))])
    assert "the data set has a random transform" in why_random(loader(nested), None)


@pytest.mark.parametrize("transform", FIXED, ids=str)
def test_deterministic_transforms_are_not_random(transform):
    assert why_random(loader(Images(transform)), transform) is None


@pytest.mark.parametrize("noise", [Noise(), v2.Lambda(Noise())], ids=str)
def test_images_of_unknown_transforms_are_read_twice(noise):
    reason = "training images are not the same when they are read again"
    assert why_random(loader(Images(hidden=noise)), None) == reason
    assert why_random(loader(Images(noise)), None) == reason
    assert why_random(loader(Images()), noise) == reason


def test_reading_twice_draws_no_random_numbers():
    torch.manual_seed(0)
    why_random(loader(Images(v2.Resize((8, 8)))), v2.Normalize([0.5] * 3, [0.5] * 3))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
