"""Folders of images and downloads: what a viewer shows is read, and a cache is of its own data."""

import os
import pathlib
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import Args
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import common

ANT = "train/ant/0.png"
CPU = torch.device("cpu")


def noise(key, *shape):
    return np.random.default_rng(key).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """tmp_path/own: two pictures each to train and test on ant and bee, 16x16 noise."""
    monkeypatch.chdir(tmp_path)
    for i, place in enumerate(["train/ant", "train/bee", "test/ant", "test/bee"] * 2):
        path = tmp_path / "own" / f"{place}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 16, 16, 3)).save(path)
    return tmp_path / "own"


def read(**settings):
    """Read ./own -> training pixels, labels, test pixels, labels, classes, source."""
    (train, test), classes, source = common.read_images(Args(**{"dataset": "own"} | settings))
    return *train, *test, classes, source


def load(**settings):
    return common.load_dataset(Args(**{"dataset": "own"} | settings), CPU)


def test_folder(folder, tmp_path, capsys):
    """Pictures with their classes, by name or path; val/ does for test/; what is read is said."""
    *found, classes, _ = read(data_dir=".")
    for split, pixels, labels in (("train", *found[:2]), ("test", *found[2:])):
        files = sorted(folder.glob(f"{split}/*/*"))
        assert torch.equal(pixels, torch.stack([pil_to_tensor(Image.open(f)) for f in files]))
        assert labels.tolist() == [0, 0, 1, 1] and classes == ["ant", "bee"]
    (folder / "test").rename(folder / "val")
    for place in ({"dataset": "own", "data_dir": str(tmp_path)}, {"dataset": f"{folder}/"}):
        data = load(**place)
        assert data.name == "own" and data.classes == ["ant", "bee"]
        torch.testing.assert_close(data.preprocess.undo(data.test), found[2] / 255)
        assert "own/train and val: 4 + 4 images of 16x16, 2 classes" in capsys.readouterr().out


# ------------------------------------------------------------ what a viewer shows


def gray(key=9):
    return noise(key, 16, 16)


def rgb(array):
    """(3, 16, 16) of a gray array."""
    return torch.from_numpy(np.stack([array] * 3))


WIDE = gray().astype(np.uint16) * 257 + 60
COLORS = noise(4, 16, 16, 3)
PICTURES = {
    "16-bit PNG": ("png", lambda: Image.fromarray(WIDE), rgb(gray())),
    "16-bit TIFF": ("tif", lambda: Image.fromarray(WIDE), rgb(gray())),
    "16-bit PGM": ("pgm", lambda: Image.fromarray(WIDE.astype(np.int32)), rgb(gray())),
    "8-bit gray": ("png", lambda: Image.fromarray(gray()), rgb(gray())),
    "black and white": (
        "png",
        lambda: Image.fromarray(gray() > 99),
        rgb(((gray() > 99) * 255).astype(np.uint8)),
    ),
    "palette": (
        "png",
        lambda: Image.fromarray(COLORS).quantize(256),
        pil_to_tensor(Image.fromarray(COLORS).quantize(256).convert("RGB")),
    ),
    "opaque": (
        "png",
        lambda: Image.fromarray(np.dstack([COLORS, np.full((16, 16), 255, np.uint8)])),
        pil_to_tensor(Image.fromarray(COLORS)),
    ),
    "CMYK": (
        "tif",
        lambda: Image.fromarray(COLORS).convert("CMYK"),
        pil_to_tensor(Image.fromarray(COLORS)),
    ),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_mode(kind, folder):
    suffix, make, expected = PICTURES[kind]
    make().save((folder / ANT).with_suffix(f".{suffix}"))
    if suffix != "png":
        (folder / ANT).unlink()
    assert torch.equal(read()[0][0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, folder):
    """Mirrored and turned as EXIF's eight values say (rows and columns of the stored picture)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLORS).save(folder / ANT, exif=exif)
    image = torch.from_numpy(COLORS).permute(2, 0, 1)
    expected = image.transpose(1, 2) if orientation > 4 else image
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    assert torch.equal(read()[0][0], expected.flip(flips))


def transparent(mode="RGBA"):
    image = Image.fromarray(COLORS).convert(mode)
    image.putalpha(Image.fromarray(gray()))
    return image


REFUSED = {
    "32-bit integers": ("tif", lambda: Image.fromarray(WIDE.astype(np.int32)), {}, "32 bits"),
    "floats": ("tif", lambda: Image.fromarray(gray() / np.float32(255)), {}, "32 bits"),
    "transparent": ("png", transparent, {}, "transparent"),
    "transparent gray": ("png", lambda: transparent("L"), {}, "transparent"),
    "transparent color": (
        "png",
        lambda: Image.fromarray(COLORS).quantize(9),
        {"transparency": 0},
        "transparent",
    ),
    "animation": (
        "gif",
        lambda: Image.fromarray(gray()),
        {"save_all": True, "append_images": [Image.fromarray(gray(1))]},
        "several frames",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, folder):
    """What would need a guess ends in one line with the reason."""
    suffix, make, options, reason = REFUSED[kind]
    (folder / ANT).unlink()
    make().save((folder / ANT).with_suffix(f".{suffix}"), **options)
    with pytest.raises(common.UserError, match=rf"^own[^\n]*{reason}[^\n]*$"):
        load()


MODES = dict.fromkeys("1 L P RGB RGBX CMYK YCbCr HSV LAB".split(), "as in RGB")
MODES |= dict.fromkeys("RGBA LA PA RGBa".split(), "as in RGB, if opaque")
MODES |= dict.fromkeys("I;16 I;16L I;16B I;16N".split(), "its high byte")
MODES |= dict.fromkeys("I F La".split(), "refused")


@pytest.mark.parametrize("mode", sorted({*MODES, *Image.MODES}))
def test_modes_of_pillow(mode, monkeypatch):
    """Every mode that Pillow knows, once as a file of it would be opened."""
    image = Image.fromarray(COLORS).convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB"))
    if mode.startswith("I;16"):
        image = Image.frombytes(mode, (16, 16), WIDE.astype(">u2" if mode == "I;16B" else "<u2"))
    elif mode in ("LAB", "PA"):
        image = Image.new(mode, (16, 16), (120, 140, 130) if mode == "LAB" else (3, 255))
    else:
        image = image.convert(mode)
    monkeypatch.setattr(Image, "open", lambda path: image)
    if MODES[mode] == "refused":
        with pytest.raises(ValueError):
            common.open_image("a.png")
        return
    opened = pil_to_tensor(common.open_image("a.png"))
    expected = rgb(gray()) if mode.startswith("I;16") else pil_to_tensor(image.convert("RGB"))
    assert torch.equal(opened, expected)
    if MODES[mode].endswith("opaque"):
        image = Image.new(mode, (16, 16), (9, 9, 9, 99) if mode[0] == "R" else (9, 99))
        with pytest.raises(ValueError, match="transparent"):
            common.open_image("a.png")


def test_hidden(folder):
    """What starts with a dot is no class and no image."""
    expected = read()
    for place in (".ipynb_checkpoints/1.png", "ant/.ipynb_checkpoints/2.png", "bee/._3.png"):
        for split in ("train", "test"):
            path = folder / split / place
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(COLORS).save(path)
    (folder / "train/ant/notes.txt").write_text("no picture")
    found = read()
    assert all(map(torch.equal, found[:4], expected[:4])) and found[4] == expected[4]


def test_size(folder):
    """--size: the middle square of each picture, resized; each size has its cache."""
    wide = noise(1, 16, 24, 3)
    Image.fromarray(wide).save(folder / ANT)
    square = torch.from_numpy(wide).permute(2, 0, 1)[:, :, 4:20]
    for size in (16, 20, 16, 20):
        train = read(size=size)[0]
        assert train.shape == (4, 3, size, size) and (size > 16 or torch.equal(train[0], square))


def small_test(path):
    for file in path.glob("test/*/*"):
        Image.fromarray(noise(0, 32, 24, 3)).save(file)


def flat_test(path):
    """Tiny ImageNet's own layout: test/images/*, val/images/*, without classes."""
    for split in ("test", "val"):
        shutil.rmtree(path / split, ignore_errors=True)
        (path / split / "images").mkdir(parents=True)
        shutil.copy(path / ANT, path / split / "images")


SPOILS = {
    "one class": ("classes", lambda path: [shutil.rmtree(bee) for bee in path.glob("*/bee")]),
    "class not in test": ("test/ has ant;", lambda path: shutil.rmtree(path / "test/bee")),
    "no classes to test": ("train/ has ant, bee; test/ has images; val/ has images", flat_test),
    "sizes": ("20x16.*--size", lambda path: Image.new("RGB", (20, 16)).save(path / ANT)),
    "sizes of the splits": (r"16x16.*24x32", small_test),
    "half a picture": ("cannot be read", lambda path: os.truncate(path / ANT, 200)),
    "no picture": ("cannot be read", lambda path: (path / ANT).write_text("text")),
    "an empty class": ("ant", lambda path: [f.unlink() for f in path.glob("train/ant/*")]),
    "nothing there": ("glyphs", shutil.rmtree),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_bad_folder(spoil, folder):
    word, change = SPOILS[spoil]
    change(folder)
    with pytest.raises(common.UserError, match=rf"^[^\n]*({word})[^\n]*$") as caught:
        load()
    assert "own" in str(caught.value)


def test_split_with_the_classes(folder):
    """A test/ without the classes does not hide a val/ that has them."""
    expected = read()
    (folder / "test").rename(folder / "val")
    (folder / "test/images").mkdir(parents=True)
    shutil.copy(folder / ANT, folder / "test/images")
    found = read()
    assert torch.equal(found[2], expected[2]) and found[5].endswith("train and val")


def test_known_name(folder, tmp_path):
    """--dataset cifar10 is the one in --data-dir, not a folder that lies around; ./cifar10 is."""
    shutil.copytree(folder, tmp_path / "cifar10")
    shutil.copytree(folder, tmp_path / "d/cifar10")
    Image.fromarray(COLORS).save(tmp_path / "d/cifar10" / ANT)
    inside = pil_to_tensor(Image.fromarray(COLORS))
    assert torch.equal(read(dataset="cifar10", data_dir="d")[0][0], inside)
    assert not torch.equal(read(dataset="./cifar10", data_dir="d")[0][0], inside)


class Numbers:
    """A data set of torchvision: digits of 28x28 that come in no order."""

    classes = ["zero", "one"]

    def __init__(self, root, train, download):
        self.images = [Image.fromarray(noise(i + 10 * train, 28, 28)) for i in range(4)]

    def __iter__(self):
        return zip(self.images, [1, 0, 1, 0], strict=True)


def test_download(tmp_path, monkeypatch):
    """Sorted by class, as a folder is; a folder of the same images has the same fingerprint."""
    monkeypatch.setattr(torchvision.datasets, "MNIST", Numbers)
    args = Args(dataset="mnist", data_dir=str(tmp_path))
    (train, labels), _ = common.read_images(args)[0]
    order = [Numbers(None, True, True).images[i] for i in (1, 3, 0, 2)]
    assert torch.equal(train, torch.stack([pil_to_tensor(image) for image in order]))
    assert labels.tolist() == [0, 0, 1, 1] and train.shape == (4, 1, 28, 28)
    assert load(dataset="mnist", size=16, data_dir=str(tmp_path)).shape == (1, 16, 16)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_offline(name, tmp_path, monkeypatch):
    """A download that fails says where the data could be put."""

    def fail(*_, **__):
        raise RuntimeError("Error downloading x.gz:\nTried https://a, got:\nno route")

    monkeypatch.setattr(torchvision.datasets, common.STATS[name][0], fail)
    with pytest.raises(common.UserError, match=rf"Error downloading x.gz.*{name}/train/<class>/"):
        load(dataset=name, data_dir=str(tmp_path))


# ------------------------------------------------------------ a cache is of its own data


def replace_keeping_times(path, image):
    stat = path.stat()
    image.save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_cache(folder, monkeypatch):
    """The second read opens nothing; a picture that was replaced is read, whatever its times."""
    train = read()[0]
    with monkeypatch.context() as patch:
        patch.setattr(common, "open_image", None)
        assert torch.equal(read()[0], train)
    replace_keeping_times(folder / ANT, Image.new("RGB", (16, 16), (9, 9, 9)))
    assert (read()[0][0] == 9).all()


def test_cache_of_another_folder(folder, tmp_path, monkeypatch):
    """Two projects with a relative --dataset own and one --data-dir."""
    place = str(tmp_path / "data")
    first = read(data_dir=place)[0]
    (tmp_path / "b").mkdir()
    shutil.copytree(folder, tmp_path / "b/own")
    replace_keeping_times(tmp_path / "b/own" / ANT, Image.new("RGB", (16, 16)))
    monkeypatch.chdir(tmp_path / "b")
    assert not torch.equal(read(data_dir=place)[0], first)


def swap_classes(path):
    for split in ("train", "test"):
        (path / split / "ant").rename(path / split / "x")
        (path / split / "bee").rename(path / split / "ant")
        (path / split / "x").rename(path / split / "bee")


def rename_class(path):
    for split in ("train", "test"):
        (path / split / "bee").rename(path / split / "bug")


def move_label(path):
    (path / "train/ant/0.png").rename(path / "train/bee/0.png")


CHANGES = {
    "swapped classes": (swap_classes, "both"),
    "renamed class": (rename_class, "both"),
    "another label": (move_label, "train"),
    "a pixel": (lambda path: change_pixel(path / ANT), "train"),
    "a test pixel": (lambda path: change_pixel(next(path.glob("test/ant/*"))), "test"),
}


def change_pixel(path):
    pixels = np.array(Image.open(path))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint(change, folder, tmp_path):
    """Pixels, labels and classes' names of each split count; where they lie does not."""
    shutil.copytree(folder, tmp_path / "copy/own")
    before, again = load(), load(dataset="copy/own")
    assert (before.fingerprint, before.test_fingerprint) == (
        again.fingerprint,
        again.test_fingerprint,
    )
    function, split = CHANGES[change]
    function(folder)
    after = load()
    assert (after.fingerprint != before.fingerprint) == (split in ("train", "both"))
    assert (after.test_fingerprint != before.test_fingerprint) == (split in ("test", "both"))


def test_published_statistics(folder, tmp_path):
    """The same images under a known name are standardized otherwise: another fingerprint."""
    shutil.copytree(folder, tmp_path / "x/cifar10")
    own, known = load(), load(dataset="x/cifar10")
    assert own.fingerprint != known.fingerprint and not torch.equal(own.train, known.train)


def test_whitening_cache(folder):
    """Whitening of other images is not taken."""
    first, again = load(zca=True), load(zca=True)
    change_pixel(folder / ANT)
    other = load(zca=True)
    assert torch.equal(first.preprocess.whiten, again.preprocess.whiten)
    assert not torch.equal(first.preprocess.whiten, other.preprocess.whiten)
    assert len(list(pathlib.Path("data/.cache").glob("whiten_zca-*"))) == 2
