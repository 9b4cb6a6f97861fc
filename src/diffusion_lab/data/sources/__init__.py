"""Data sets. Each is a `Source`: options are arguments of the constructor, and `load` returns a `Dataset`."""

from diffusion_lab.data.sources.base import Dataset, Source
from diffusion_lab.data.sources.celeba import CelebA
from diffusion_lab.data.sources.cifar10 import CIFAR10
from diffusion_lab.data.sources.digits import Digits
from diffusion_lab.data.sources.image_folder import ImageFolder
from diffusion_lab.data.sources.mnist import MNIST, FashionMNIST

__all__ = ["CIFAR10", "MNIST", "CelebA", "Dataset", "Digits", "FashionMNIST", "ImageFolder", "Source"]
