"""Folders of images and downloads: what a viewer shows is read, and a cache is of its own data."""

import operator
import os
import pathlib
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import common

ANT, ANOTHER_ANT, NEW_BEE = "train/ant/0.png", "train/ant/4.png", "train/bee/0.png"


def noise(key, *shape):
    return np.random.default_rng(key).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """tmp_path/own: two pictures each to train and test on ant and bee, 16x16 noise."""
    monkeypatch.chdir(tmp_path)
    for i, place in enumerate(["train/ant", "train/bee", "test/ant", "test/bee"] * 2):
        path = tmp_path / "own" / f"{place}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 16, 16, 3)).save(path, compress_level=0)  # all of one size
    return tmp_path / "own"


def read(dataset="own", **settings):
    """Read ./own -> training pixels, labels, test pixels, labels, classes, source."""
    (train, test), classes, source = common.read_images(common.Args(dataset=dataset, **settings))
    return *train, *test, classes, source


def load(dataset="own", **settings):
    return common.load_dataset(common.Args(dataset=dataset, **settings), torch.device("cpu"))


def test_folder(folder, tmp_path, capsys):
    """Pictures with their classes, by name or path; val/ for a test/ without them; it is said."""
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
        flat(folder, ["test"])


# ------------------------------------------------------------ what a viewer shows

DEEP = noise(9, 16, 16).astype(np.uint16) * 257 + 60  # 16 bits
WIDE, FLOATS = Image.fromarray(DEEP.astype(np.int32)), Image.fromarray(DEEP / np.float32(9))
GRAY, COLOR = Image.fromarray(noise(9, 16, 16)), Image.fromarray(noise(4, 16, 16, 3))
PALETTE, CIELAB = COLOR.quantize(256), Image.new("LAB", (16, 16), (120, 140, 130))
BLACK = noise(9, 16, 16) > 99


def with_alpha(image, alpha):
    image = image.copy()
    image.putalpha(alpha)
    return image


# suffix, the picture that is saved, the one that is shown (None: refused), options
PICTURES = {
    "16-bit PNG": ("png", Image.fromarray(DEEP), GRAY, {}),
    "16-bit TIFF": ("tif", Image.fromarray(DEEP), GRAY, {}),
    "16-bit big-endian": ("tif", Image.fromarray(DEEP.astype(">u2")), GRAY, {}),
    "16-bit PGM": ("pgm", WIDE, GRAY, {}),
    "8-bit gray": ("png", GRAY, GRAY, {}),
    "black and white": ("png", Image.fromarray(BLACK), Image.fromarray(BLACK * np.uint8(255)), {}),
    "palette": ("png", PALETTE, PALETTE, {}),
    "opaque": ("png", with_alpha(COLOR, 255), COLOR, {}),
    "opaque gray": ("png", with_alpha(GRAY, 255), GRAY, {}),
    "opaque palette": ("tif", with_alpha(PALETTE.convert("PA"), 255), PALETTE, {}),
    "CMYK": ("tif", COLOR.convert("CMYK"), COLOR, {}),
    "YCbCr": ("tif", COLOR.convert("YCbCr"), COLOR.convert("YCbCr"), {}),
    "CIELAB": ("tif", CIELAB, CIELAB, {}),
    "32-bit integers": ("tif", WIDE, None, {}),
    "floats": ("tif", FLOATS, None, {}),
    "transparent": ("png", with_alpha(COLOR, GRAY), None, {}),
    "transparent gray": ("png", with_alpha(GRAY, GRAY), None, {}),
    "transparent palette": ("tif", with_alpha(PALETTE.convert("PA"), GRAY), None, {}),
    "transparent color": ("png", COLOR.quantize(9), None, {"transparency": 0}),
    "animation": ("gif", GRAY, None, {"save_all": True, "append_images": [GRAY.rotate(90)]}),
}
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
for orientation, turn in enumerate(TURNS.split(), 2):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = COLOR.transpose(Image.Transpose[turn])
    PICTURES[f"EXIF {orientation}"] = ("png", COLOR, shown, {"exif": exif})


@pytest.mark.parametrize("kind", PICTURES)
def test_picture(kind, folder):
    """What would need a guess ends in one line with the file and the reasons."""
    suffix, image, shown, options = PICTURES[kind]
    (folder / ANT).unlink()
    image.save((folder / ANT).with_suffix(f".{suffix}"), **options)
    if shown:
        assert torch.equal(read()[0][0], pil_to_tensor(shown.convert("RGB")))
        return
    with pytest.raises(common.UserError, match=r"^own[^\n]*/0\.[^\n]*: use 8-bit RGB[^\n]*$"):
        load()


def test_hidden(folder):
    """What starts with a dot is no class and no image."""
    expected = read()
    for place in (".ipynb_checkpoints/1.png", "ant/.ipynb_checkpoints/2.png", "bee/._3.png"):
        for split in ("train", "test"):
            (folder / split / place).parent.mkdir(exist_ok=True)
            COLOR.save(folder / split / place)
    (folder / "train/ant/notes.txt").write_text("no picture")
    found = read()
    assert all(map(torch.equal, found[:4], expected[:4])) and found[4] == expected[4]


def test_size(folder):
    """--size: the middle square of each picture, resized; each size has its cache."""
    wide = Image.fromarray(noise(1, 16, 24, 3))
    wide.save(folder / ANT)
    for size in (16, 20, 16, 20):
        train = read(size=size)[0]
        assert train.shape == (4, 3, size, size)
        assert size == 20 or torch.equal(train[0], pil_to_tensor(wide)[:, :, 4:20])


def flat(path, splits=("test", "val")):
    """Tiny ImageNet's own layout: test/images/*, val/images/*, without classes."""
    for split in splits:
        shutil.rmtree(path / split, ignore_errors=True)
        (path / split / "images").mkdir(parents=True)
        shutil.copy(path / ANT, path / split / "images")


def enlarge(path):
    COLOR.resize((24, 32)).save(path)


SPOILS = {
    "one class": ("one class", lambda path: [shutil.rmtree(bee) for bee in path.glob("*/bee")]),
    "class not in test": ("(bee)", lambda path: shutil.rmtree(path / "test/bee")),
    "no classes to test": ("(ant, bee, images)", flat),
    "sizes": ("24x32.*--size", lambda path: enlarge(path / ANT)),
    "sizes of the splits": ("16x16.*24x32", lambda path: list(map(enlarge, path.glob("test/*/*")))),
    "half a picture": (f"{ANT}: ", lambda path: os.truncate(path / ANT, 200)),
    "no picture": (f"{ANT}: ", lambda path: (path / ANT).write_text("text")),
    "an empty class": ("ant", lambda path: [f.unlink() for f in path.glob("train/ant/*")]),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_bad_folder(spoil, folder):
    word, change = SPOILS[spoil]
    change(folder)
    with pytest.raises(common.UserError, match=rf"^[^\n]*({word})[^\n]*$") as caught:
        load()
    assert "own" in str(caught.value)


def test_known_name(folder, tmp_path):
    """--dataset cifar10 is the one in --data-dir, not a folder that lies around; ./cifar10 is."""
    shutil.copytree(folder, tmp_path / "cifar10")
    shutil.copytree(folder, tmp_path / "d/cifar10")
    COLOR.save(tmp_path / "d/cifar10" / ANT)
    for name, inside in (("cifar10", True), ("./cifar10", False)):
        found = read(dataset=name, data_dir="d")[0][0]
        assert torch.equal(found, pil_to_tensor(COLOR)) == inside
    # its published statistics are others than the images'
    own, known = load(), load(dataset="./cifar10")
    assert own.fingerprint != known.fingerprint and not torch.equal(own.train, known.train)


class Numbers:
    """A data set of torchvision: digits of 28x28 that come in no order."""

    classes = ["0 - zero", "1 - one"]

    def __init__(self, root, train, download):
        self.images = [Image.fromarray(noise(i + 10 * train, 28, 28)) for i in range(4)]

    def __iter__(self):
        return zip(self.images, [1, 0, 1, 0], strict=True)


def test_download(tmp_path, monkeypatch):
    """Sorted by class, as a folder is; a folder of the same images has the same fingerprint."""
    monkeypatch.setattr(torchvision.datasets, "MNIST", Numbers)
    settings = {"dataset": "mnist", "data_dir": str(tmp_path)}
    train, labels, *_ = read(**settings)
    order = [Numbers(None, True, True).images[i] for i in (1, 3, 0, 2)]
    assert torch.equal(train, torch.stack([pil_to_tensor(image) for image in order]))
    assert labels.tolist() == [0, 0, 1, 1] and train.shape == (4, 1, 28, 28)
    assert load(size=16, **settings).shape == (1, 16, 16)
    downloaded = load(**settings)
    for split in ("train", "test"):
        for i, (image, label) in enumerate(Numbers(None, split == "train", True)):
            path = tmp_path / "mnist" / split / Numbers.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    assert load(**settings).fingerprint == downloaded.fingerprint


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_offline(name, tmp_path, monkeypatch):
    """A download that fails says where the data could be put."""

    def fail(*_, **__):
        raise RuntimeError("Error downloading x.gz:\nTried https://a, got:\nno route")

    monkeypatch.setattr(torchvision.datasets, common.STATS[name][0], fail)
    with pytest.raises(common.UserError, match=rf"Error downloading x.gz.*{name}/train/<class>/"):
        load(dataset=name, data_dir=str(tmp_path))


def change_pixel(path, keep_times=False):
    pixels, stat = np.array(Image.open(path)), path.stat()
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(path, compress_level=0)
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_cache(folder, tmp_path, monkeypatch):
    """A second read opens nothing; a new picture is read, of the same times or another ./own."""
    place = str(tmp_path / "data")
    first = read(data_dir=place)[0]
    with monkeypatch.context() as patch:
        patch.setattr(common, "open_image", None)
        assert torch.equal(read(data_dir=place)[0], first)
    (tmp_path / "b").mkdir()
    shutil.copytree(folder, tmp_path / "b/own")
    changes = (tmp_path, ANT, [1, 0, 0, 0]), (tmp_path / "b", ANOTHER_ANT, [0, 1, 0, 0])
    for project, picture, changed in changes:
        monkeypatch.chdir(project)
        change_pixel(pathlib.Path("own") / picture, keep_times=True)
        assert (read(data_dir=place)[0] != first).flatten(1).sum(1).tolist() == changed


def rename(path, *names):
    """Rename classes: the first name to the second, the third to the fourth, ..."""
    for split in ("train", "test"):
        for old, new in zip(names[::2], names[1::2], strict=True):
            (path / split / old).rename(path / split / new)


def prints(dataset="own"):
    data = load(dataset=dataset)
    return data.fingerprint, data.test_fingerprint


CHANGES = {
    "swapped classes": ((True, True), lambda path: rename(path, *"ant x bee ant x bee".split())),
    "renamed class": ((True, True), lambda path: rename(path, "bee", "bug")),
    "another label": ((True, False), lambda path: os.rename(path / ANOTHER_ANT, path / NEW_BEE)),
    "a pixel": ((True, False), lambda path: change_pixel(path / ANT)),
    "a test pixel": ((False, True), lambda path: change_pixel(next(path.glob("test/ant/*")))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint(change, folder, tmp_path):
    """Pixels, labels and classes' names of each split count; where they lie does not."""
    shutil.copytree(folder, tmp_path / "copy/own")
    changed, function = CHANGES[change]
    before, copied = prints(), prints("copy/own")
    function(folder)
    assert before == copied and tuple(map(operator.ne, before, prints())) == changed


def test_whitening_cache(folder):
    """Whitening of other images is not taken."""
    first, again = (load(zca=True).preprocess.whiten for _ in range(2))
    change_pixel(folder / ANT)
    assert torch.equal(first, again) and not torch.equal(first, load(zca=True).preprocess.whiten)
