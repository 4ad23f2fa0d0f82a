"""Flips and crops of training images, which keep their class: another picture at every look."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

PAD = 4  # pixels around a training image before it is cropped, as published for CIFAR


class Augmented(Dataset):
    """A data set (x (C, H, W), y) whose images are cropped and mirrored anew at every access.

    The random numbers are torch's own: they follow torch.manual_seed, and the workers of a
    DataLoader have different ones. `plain` is the data set as it was.
    """

    def __init__(self, plain: Dataset):
        self.plain = plain

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.plain[i]
        return cropped(x), y


def cropped(x: Tensor) -> Tensor:
    """A random crop of x, (C, H, W), after padding it with zeros, mirrored every other time."""
    _, H, W = x.shape
    top, left = torch.randint(2 * PAD + 1, (2,)).tolist()
    x = torch.nn.functional.pad(x, (PAD, PAD, PAD, PAD))[:, top : top + H, left : left + W]
    return x.flip(2) if torch.rand(()) < 0.5 else x
