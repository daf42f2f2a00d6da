"""Images and labels to train on: scikit-learn's handwritten digits, and MNIST from its four IDX files.

Pixels are scaled by public constants, never by statistics of the data: those would be a query that no privacy
budget accounts for.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pegrad.errors import DataFileError, MissingExtraError

# The mean and standard deviation of MNIST's pixels that the literature has long published and uses.
MNIST_MEAN = 0.1307
MNIST_STD = 0.3081

_CLASSES = 10
_DIGITS_TEST_SIZE = 360
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UNSIGNED_BYTE = 0x08


class Dataset(NamedTuple):
    """Images and their classes, split into a part to train on and a part to test on.

    Attributes:
        train_images: (N, 1, H, W) float32.
        train_labels: (N,) int64, in [0, num_classes).
        test_images: (M, 1, H, W) float32.
        test_labels: (M,) int64, in [0, num_classes).
        name: what to call the data in tables and file names.
        num_classes: how many classes there are.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    name: str
    num_classes: int


def load_digits() -> Dataset:
    """Load the 1,797 handwritten digits of 8×8 pixels that scikit-learn ships.

    The split is fixed: 1,437 images to train on and 360 to test on, in an order shuffled once and for all,
    because the file keeps each writer's together. Pixels, integers from 0 to 16, are divided by 16.

    Returns:
        The data set, named "digits".

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository; its test part.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            'load_digits needs scikit-learn, which is not installed: pip install "pegrad[train]".'
        ) from error
    digits = datasets.load_digits()
    # NumPy froze the stream of RandomState for good, so this order is the same on every machine and version.
    order = np.random.RandomState(0).permutation(len(digits.target))
    test, train = order[:_DIGITS_TEST_SIZE], order[_DIGITS_TEST_SIZE:]
    images = torch.from_numpy(digits.images[:, None].astype(np.float32) / 16)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Dataset(images[train], labels[train], images[test], labels[test], "digits", _CLASSES)


def load_mnist(directory: str | Path) -> Dataset:
    """Load MNIST, or any data set in its format, from its four IDX files.

    The files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
    `t10k-labels-idx1-ubyte`, with or without `.gz` after the name, gzipped or not. Pixels are divided by 255,
    then centred and scaled by the published mean 0.1307 and standard deviation 0.3081.

    Args:
        directory: the folder that holds them.

    Returns:
        The data set, named "mnist".

    Raises:
        DataFileError: a file is missing, truncated, corrupted or not of this format, or two files disagree.

    Source:
        LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """
    paths = _find(Path(directory), _FILES)
    train_images, train_labels = _read_part(*paths[:2])
    test_images, test_labels = _read_part(*paths[2:])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataFileError(
            f"{paths[2]}: expected images of {_times(train_images.shape[1:])} pixels, as in {paths[0].name}, "
            f"found {_times(test_images.shape[1:])}."
        )
    return Dataset(_normalise(train_images), train_labels, _normalise(test_images), test_labels, "mnist", _CLASSES)


def _find(directory: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the path of each file, plain or with `.gz`; one error lists all those that are missing."""
    paths, missing = [], []
    for name in names:
        found = [path for path in (directory / name, directory / f"{name}.gz") if path.is_file()]
        if found:
            paths.append(found[0])
        else:
            missing.append(f"{name}[.gz]")
    if missing:
        raise DataFileError(
            f"{directory}: expected the four MNIST files, did not find {', '.join(missing)}. "
            "Pass the directory that holds them."
        )
    return paths


def _read_part(images_path: Path, labels_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, H, W) uint8 images and (N,) int64 labels that agree with each other."""
    images = _read_idx(images_path, dimensions=3)
    labels = _read_idx(labels_path, dimensions=1).long()
    if images.numel() == 0:
        raise DataFileError(f"{images_path}: expected at least one image and pixel, found shape {images.shape}.")
    if len(images) != len(labels):
        raise DataFileError(
            f"{labels_path}: expected {len(images)} labels, one for each image of {images_path.name}, "
            f"found {len(labels)}."
        )
    foreign = int((labels >= _CLASSES).sum())
    if foreign:
        raise DataFileError(
            f"{labels_path}: expected labels from 0 to {_CLASSES - 1}, {foreign} of {len(labels)} are not."
        )
    return images, labels


def _read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Return the array of unsigned bytes in an IDX file: a magic number, big-endian sizes, then the bytes."""
    content = _read_bytes(path)
    magic = bytes([0, 0, _IDX_UNSIGNED_BYTE, dimensions])
    header_size = len(magic) + 4 * dimensions
    if content[: len(magic)] != magic:
        raise DataFileError(
            f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimension(s), which begins with "
            f"{magic.hex(' ')}; this one begins with {content[: len(magic)].hex(' ') or 'nothing'}."
        )
    if len(content) < header_size:
        raise DataFileError(f"{path}: expected a header of {header_size} bytes, the file ends after {len(content)}.")
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=len(magic)).tolist()
    expected, found = math.prod(shape), len(content) - header_size
    if found != expected:
        problem = "truncated" if found < expected else "too long"
        raise DataFileError(
            f"{path}: {problem}; its header announces {_times(shape)} = {expected} bytes, found {found}."
        )
    array = np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)
    return torch.from_numpy(array.copy())


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file, unzipped if it begins as gzip files do, whatever its name."""
    content = path.read_bytes()
    if content[: len(_GZIP_MAGIC)] != _GZIP_MAGIC:
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataFileError(f"{path}: expected a whole gzip file, found a damaged one ({error}).") from error


def _normalise(images: torch.Tensor) -> torch.Tensor:
    """Return (N, 1, H, W) float32 images from (N, H, W) bytes."""
    # In place, on the fresh copy that the conversion makes: MNIST in float32 is 188 MB.
    return images.unsqueeze(1).to(torch.float32).div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)


def _times(shape: torch.Size | list[int]) -> str:
    return "×".join(map(str, shape))
