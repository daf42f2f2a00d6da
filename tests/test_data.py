"""The loaders: what they return, and what each kind of wrong file is told."""

import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pegrad.errors import DataFileError, MissingExtraError
from pegrad.papers.data import MNIST_MEAN, MNIST_STD, Dataset, load_digits, load_mnist

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def arrays() -> dict[str, np.ndarray]:
    """Seven 4×3 images to train on, two to test on."""
    random = np.random.default_rng(0)
    return {
        TRAIN_IMAGES: random.integers(0, 256, (7, 4, 3)),
        TRAIN_LABELS: np.arange(3, 10),
        TEST_IMAGES: random.integers(0, 256, (2, 4, 3)),
        TEST_LABELS: np.array([0, 9]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, array in arrays().items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def assert_well_formed(data: Dataset) -> None:
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.ndim == 4
        assert images.shape[:2] == (len(labels), 1)
        assert images.is_contiguous()
        assert labels.min() >= 0
        assert labels.max() < data.num_classes


def test_mnist_pixels_and_labels(folder: Path) -> None:
    """Catches: sizes read little-endian, rows and columns exchanged, test and training parts exchanged."""
    data = load_mnist(str(folder))
    assert_well_formed(data)
    assert (data.name, data.num_classes) == ("mnist", 10)
    for images, labels, names in (
        (data.train_images, data.train_labels, (TRAIN_IMAGES, TRAIN_LABELS)),
        (data.test_images, data.test_labels, (TEST_IMAGES, TEST_LABELS)),
    ):
        expected = (arrays()[names[0]][:, None] / 255 - MNIST_MEAN) / MNIST_STD
        torch.testing.assert_close(images, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)
        assert labels.tolist() == arrays()[names[1]].tolist()


def test_mnist_reads_gzip_by_content(folder: Path) -> None:
    """Catches: a choice by name: some browsers unzip a .gz on the way, or drop the suffix alone."""
    expected = load_mnist(folder)
    (folder / TRAIN_IMAGES).write_bytes(gzip.compress((folder / TRAIN_IMAGES).read_bytes()))
    (folder / TRAIN_LABELS).rename(folder / f"{TRAIN_LABELS}.gz")
    (folder / f"{TEST_IMAGES}.gz").write_bytes(gzip.compress((folder / TEST_IMAGES).read_bytes()))
    (folder / TEST_IMAGES).unlink()
    for found, wanted in zip(load_mnist(folder), expected, strict=True):
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


def test_all_missing_files_are_named_at_once(folder: Path) -> None:
    """Catches: an error for the first file only, or for files that are there."""
    (folder / TRAIN_LABELS).unlink()
    (folder / TEST_IMAGES).unlink()
    with pytest.raises(DataFileError) as caught:
        load_mnist(folder)
    message = str(caught.value)
    assert f"{TRAIN_LABELS}[.gz], {TEST_IMAGES}[.gz]" in message
    assert str(folder) in message
    assert TRAIN_IMAGES not in message
    with pytest.raises(DataFileError, match=TEST_LABELS):
        load_mnist(folder / "nowhere")


def zipped_then(damage: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: damage(gzip.compress(content, mtime=0))


def flip_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (TRAIN_IMAGES, lambda content: content[:-1], r"truncated.* 7×4×3 = 84 bytes, found 83"),
        (TRAIN_IMAGES, lambda content: content + b"\0", r"too long.* 7×4×3 = 84 bytes, found 85"),
        (TEST_LABELS, lambda content: content[:8], r"truncated.* 2 = 2 bytes, found 0"),
        (TRAIN_IMAGES, lambda content: content[:9], r"header of 16 bytes, the file ends after 9"),
        (TRAIN_IMAGES, lambda content: b"", r"begins with nothing"),
        (TRAIN_IMAGES, lambda content: b"\x89PNG\r\n", r"00 00 08 03; this one begins with 89 50 4e 47"),
        (TRAIN_LABELS, lambda content: content[:2] + b"\x0d" + content[3:], r"00 00 08 01; .* 00 00 0d 01"),
        (TRAIN_IMAGES, lambda content: idx(np.zeros(7)), r"3 dimension.*begins with 00 00 08 01"),
        (TRAIN_LABELS, lambda content: idx(np.zeros((7, 1, 1))), r"1 dimension.*begins with 00 00 08 03"),
        (TRAIN_LABELS, lambda content: idx(np.zeros(6)), rf"expected 7 labels.*{TRAIN_IMAGES}, found 6"),
        (TEST_LABELS, lambda content: idx(np.array([9, 10])), r"labels from 0 to 9, 1 of 2 are not"),
        (
            TEST_IMAGES,
            lambda content: idx(np.zeros((2, 3, 4))),
            rf"4×3 pixels, as in {TRAIN_IMAGES}, found 3×4",
        ),
        (TEST_IMAGES, lambda content: idx(np.zeros((0, 4, 3))), r"at least one image"),
        (TRAIN_IMAGES, zipped_then(lambda content: content[:-9]), r"whole gzip file"),
        (TRAIN_IMAGES, zipped_then(flip_middle), r"whole gzip file"),
        (TRAIN_IMAGES, zipped_then(lambda content: content[:10] + b"\x07" + content[11:]), r"whole gzip file"),
        (TRAIN_IMAGES, zipped_then(lambda content: content[:-8] + bytes(8)), r"whole gzip file"),
        (TRAIN_IMAGES, zipped_then(lambda content: content[:2] + b"\0" + content[3:]), r"whole gzip file"),
    ],
    ids=[
        "truncated",
        "too long",
        "header only",
        "header truncated",
        "empty",
        "foreign",
        "other element type",
        "labels for images",
        "images for labels",
        "fewer labels than images",
        "label out of range",
        "test images of another size",
        "no images",
        "gzip truncated",
        "gzip corrupted",
        "gzip block",
        "gzip checksum",
        "gzip method",
    ],
)
def test_damaged_files(folder: Path, name: str, damage: Callable[[bytes], bytes], words: str) -> None:
    """Catches: a check left out, which would show as another error or as silence."""
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataFileError, match=words) as caught:
        load_mnist(folder)
    assert str(caught.value).startswith(f"{path}: ")


def test_digits() -> None:
    """Catches: a split that leaks, loses or repeats an image, or images that part from their labels."""
    from sklearn import datasets

    data = load_digits()
    assert_well_formed(data)
    assert (data.name, data.num_classes) == ("digits", 10)
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1

    def rows(images: np.ndarray, labels: np.ndarray) -> list[tuple[float, ...]]:
        return sorted((*image.ravel(), label) for image, label in zip(images, labels, strict=True))

    source = datasets.load_digits()
    images = torch.cat([data.train_images, data.test_images]).numpy()
    labels = torch.cat([data.train_labels, data.test_labels]).numpy()
    assert rows(images * 16, labels) == rows(source.images, source.target)


def test_the_split_of_the_digits_is_pinned() -> None:
    """Catches: another shuffle, after which published accuracies could not be compared."""
    data = load_digits()
    assert data.test_labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert data.train_labels[:12].tolist() == [6, 5, 3, 4, 4, 4, 8, 8, 7, 0, 9, 6]
    assert torch.equal(load_digits().train_images, data.train_images)
    assert data.test_labels.bincount().min() >= 25


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a bare ImportError that does not name the extra."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pegrad\[train\]"'):
        load_digits()


@pytest.mark.skipif("PEGRAD_DATA" not in os.environ, reason="PEGRAD_DATA names no folder with mnist/ in it")
def test_the_real_mnist() -> None:
    """Catches: pixels scaled by other constants than those that centre them."""
    data = load_mnist(Path(os.environ["PEGRAD_DATA"]) / "mnist")
    assert_well_formed(data)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.train_images.mean().item() == pytest.approx(0, abs=1e-3)
    assert data.train_images.std().item() == pytest.approx(1, abs=1e-3)
