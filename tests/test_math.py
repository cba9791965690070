"""The mathematics, each part against another way of computing it."""
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import haba
from conftest import ROOT
from plain import plain_match


def uniform(count, *columns):
    """u for common.dsa: `count` random rows, with the columns given in their place."""
    u = torch.rand(count, 3, generator=torch.Generator().manual_seed(5))
    for i, value in enumerate(columns):
        if value is not None:
            u[:, i] = value
    return u


# ------------------------------------------------------------------------------------------ the unroll

SCENES = ("all images", "mini-batches", "DSA", "hallucinators", "soft labels", "labels alone", "chunks")


def scene(kind):
    """-> net, start, target, step size, batch(n), leaves: one way of making a student's batches, float64."""
    torch.manual_seed(11)
    net = common.ConvNet((3, 16, 16), 3, width=8).double()
    start = common.flat_parameters(net)
    start += 0.05 * torch.randn_like(start)  # biases and norms away from 0 and 1
    target = start + 0.02 * torch.randn_like(start)
    images = torch.randn(10, 3, 16, 16, dtype=torch.double, requires_grad=kind != "labels alone")
    labels, leaves = torch.arange(10) % 3, [images]
    model = haba.Hallucinators(3, (3, 16, 16), (3, 16, 16), 3, 1).double()
    if kind in ("soft labels", "labels alone"):
        labels = torch.randn(10, 3, dtype=torch.double).softmax(1).requires_grad_()
        leaves = [labels] if kind == "labels alone" else [images, labels]
    if kind == "hallucinators":
        leaves = [images, *model.parameters()]

    def batch(n):
        index = common.student_batch(10, 4 if kind in ("mini-batches", "soft labels") else 0, n, 0, "scene")
        x = images[index]
        if kind == "hallucinators":
            x = model(x, [n % 3])[0]
        if kind in ("DSA", "hallucinators", "labels alone"):
            x = common.dsa(x, *common.draw_dsa(len(x), "scene", n))
        return x, labels[index]

    return net, start, target, torch.tensor(0.05, dtype=torch.double, requires_grad=True), batch, leaves


def relative(ours, theirs):
    assert theirs.norm() > 0
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("steps", (1, 2, 7))
@pytest.mark.parametrize("kind", SCENES)
def test_unroll(kind, steps, monkeypatch):
    """match_trajectory against autograd through the whole graph: loss, gradients of leaves and of the step size."""
    net, start, target, step_size, batch, leaves = scene(kind)
    loss = plain_match(net, start, target, step_size, batch, steps)
    theirs = [leaf.grad.clone() for leaf in (step_size, *leaves)]
    for leaf in (step_size, *leaves):
        leaf.grad = None
    if kind == "chunks":
        monkeypatch.setattr(common, "chunk_size", lambda device: 3)  # 10 images: 3, 3, 3 and 1
    before = start.clone()
    our_loss, of_step = common.match_trajectory(net, start, target, step_size, batch, steps)
    assert relative(our_loss, loss) <= 1e-8
    for ours, grad in zip([of_step] + [leaf.grad for leaf in leaves], theirs):
        assert grad.norm() == ours.norm() == 0 or relative(ours, grad) <= 1e-8
    assert sum(grad.norm() > 0 for grad in theirs) >= 2
    assert torch.equal(start, before)  # an expert is not to be changed


COMPILER = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")


@pytest.mark.parametrize("kind, compiler", (pytest.param("hallucinators", True, marks=COMPILER), ("soft labels", False)))
def test_compiled_unroll(kind, compiler, monkeypatch):
    """--compile: the same numbers, in float64; without a compiler those of the pure functions that it is given."""
    really, given = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **more: [given.append(f), really(f, **more) if compiler else f][1])
    *arguments, step_size, batch, leaves = scene(kind)
    found = []
    for compiled in (False, True):
        loss, of_step = common.match_trajectory(*arguments, step_size, batch, 2, compiled)
        found.append([loss, of_step, *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    assert all(relative(ours, theirs) <= 1e-10 for ours, theirs in zip(*found))
    assert len(given) == 2


def test_unroll_adds_to_grad():
    """match_trajectory adds to .grad, as backward() does: twice gives twice."""
    *arguments, leaves = scene("hallucinators")
    common.match_trajectory(*arguments, 2)
    once = [leaf.grad.clone() for leaf in leaves]
    common.match_trajectory(*arguments, 2)
    assert all(torch.allclose(leaf.grad, 2 * grad, rtol=1e-10) for leaf, grad in zip(leaves, once))


def peak(way, images, steps):
    """Peak memory in MB of one match in a process of its own; glibc gives freed blocks back at once, so that its
    heap's fragmentation, 8 to 20 % by chance, is not measured."""
    script = pathlib.Path(__file__).with_name("plain.py")
    result = subprocess.run([sys.executable, script, ROOT, way, str(images), str(steps)], text=True, check=True,
                            capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "8000000"})
    return float(result.stdout)


def test_unroll_memory():
    """Peak memory of 50 student steps is within 10 % of that of 10; autograd's is not, even for 10 and 2."""
    assert peak("ours", 20, 50) <= 1.1 * peak("ours", 20, 10)
    assert peak("plain", 8, 10) > 1.3 * peak("plain", 8, 2)


@pytest.mark.parametrize("size", (8, 9))
def test_average_pool(size):
    """AvgPool and its gradient are torch's own; an odd side loses its last row and column."""
    x = torch.randn(2, 3, size, size, dtype=torch.double, requires_grad=True)
    pairs = [(pooled, *torch.autograd.grad(pooled.square().sum(), x)) for pooled in (common.AvgPool()(x), F.avg_pool2d(x, 2))]
    assert all(torch.allclose(ours, theirs, rtol=1e-12) for ours, theirs in zip(*pairs))


@pytest.mark.parametrize("batch", (0, 3, 4, 10, 99))
def test_student_batch(batch):
    """Mini-batches of one pass over the images do not overlap and have the asked size; 0 or too many: all."""
    for first in (0, 10 // batch if 0 < batch < 10 else 1):
        steps = range(first, first + (10 // batch if 0 < batch < 10 else 1))
        drawn = torch.cat([common.student_batch(10, batch, n, "key") for n in steps])
        assert len(drawn.unique()) == len(drawn) == (10 // batch * batch if 0 < batch < 10 else 10)


# ------------------------------------------------------------------------------------------ networks

def test_parameter_counts():
    """320,010 for the ConvNet; hallucinators as in the supplement's Tab. 3 and 4."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(common.ConvNet((3, 32, 32), 10)) == 320010
    for channels, depth, expected in ((3, 0, 6144), (3, 1, 6312), (8, 1, 16827), (16, 1, 33651),
                                      (None, 0, 6144), (None, 1, 6312), (None, 2, 10963), (None, 3, 16131)):
        assert count(haba.Hallucinators(1, (3, 32, 32), (3, 32, 32), channels, depth)) == expected
        assert count(haba.Hallucinators(4, (3, 32, 32), (3, 32, 32), channels, depth)) == 4 * expected


@pytest.mark.parametrize("shape, depth", (((1, 28, 28), 3), ((3, 32, 32), 3), ((1, 32, 32), 3), ((3, 64, 64), 4),
                                          ((3, 128, 128), 5)))
def test_convnet_shapes(shape, depth):
    """Depth by size as the README says, 4x4 maps at the end, one logit a class; 28x28 digits become 32x32 maps."""
    net = common.ConvNet(shape, 7)
    assert net.depth == depth and sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == depth
    images = torch.randn(2, *shape)
    assert net.features(images).shape == (2, 128 * 4 * 4) and net(images).shape == (2, 7)
    assert net.blocks[0](images).shape[-1] == max(32, shape[-1])


def test_instance_norm():
    """The ConvNet's norm against F.instance_norm with affine, in training and evaluation mode."""
    norm = common.ConvNet((3, 16, 16), 3, width=8).blocks[1]
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(4, 8, 16, 16) + 1
    for mode in (True, False):
        assert torch.allclose(norm.train(mode)(x), F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=1e-5),
                              atol=1e-5)


@pytest.mark.parametrize("depth, basis_shape, channels", ((0, (3, 16, 16), 3), (1, (3, 16, 16), 3), (1, (1, 16, 16), 8),
                                                          (2, (3, 8, 8), 5), (3, (3, 16, 16), 4)))
def test_hallucinators_side_by_side(depth, basis_shape, channels):
    """The grouped convolution against each hallucinator alone, Eq. (2) with nn.functional.conv2d."""
    torch.manual_seed(0)
    model = haba.Hallucinators(4, (3, 16, 16), basis_shape, channels, depth)
    torch.nn.init.normal_(model.scale), torch.nn.init.normal_(model.shift)
    bases, which = torch.randn(5, *basis_shape), [2, 0, 3, 2]
    images = model(bases, which)
    assert images.shape == (4, 5, 3, 16, 16)
    for row, j in zip(images, which):
        x = F.interpolate(bases, (16, 16), mode="bilinear") if basis_shape[1] == 8 else bases
        for i, block in enumerate(model.encoder):
            if i:  # half the side between blocks: means of 2x2 pixels
                x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
            x = F.conv2d(x, block["weight"][j], block["bias"][j], padding=1).relu()
        x = model.scale[j] * x + model.shift[j]
        for i, block in enumerate(model.decoder):
            x = x.relu().repeat_interleave(2, 2).repeat_interleave(2, 3) if i else x
            x = F.conv2d(x, block["weight"][j], block["bias"][j], padding=1)
        assert torch.allclose(row, x, atol=1e-5)


# ------------------------------------------------------------------------------------------ HaBa's losses

def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_contrastive_loss():
    """L_con of Eq. (3) against a loop over j, k, i, u as printed, on normalised features."""
    f = torch.randn(3, 5, 4, dtype=torch.double)
    total = 0
    for j in range(3):
        for k in range(3):
            for i in range(5):
                shares = [math.exp(cosine(f[j, i], f[k, u]) / 0.07) for u in range(5)]
                total -= math.log(shares[i] / sum(shares))
    assert haba.contrastive_loss(f).item() == pytest.approx(total / (3 * 3 * 5), rel=1e-9)


def test_supervised_contrastive_loss():
    """The supervised form against a loop over anchors and positives (Khosla et al. 2020, Eq. 2)."""
    f, labels = torch.randn(2, 5, 4, dtype=torch.double), torch.tensor([0, 1, 0, 2, 1])
    z = [(f[j, i], int(labels[i])) for j in range(2) for i in range(5)]
    total = 0
    for a, (za, ya) in enumerate(z):
        others = sum(math.exp(cosine(za, zo) / 0.07) for o, (zo, _) in enumerate(z) if o != a)
        positive = [zp for p, (zp, yp) in enumerate(z) if p != a and yp == ya]
        total -= sum(math.log(math.exp(cosine(za, zp) / 0.07) / others) for zp in positive) / len(positive)
    assert haba.contrastive_loss(f, labels).item() == pytest.approx(total / len(z), rel=1e-9)


def test_supervised_contrastive_loss_gradient():
    """No NaN leaks into the gradient from the anchor's own masked entry, nor where an anchor has no positive."""
    f = torch.randn(1, 3, 4, requires_grad=True)
    haba.contrastive_loss(f, torch.tensor([0, 0, 1])).backward()
    assert f.grad.isfinite().all() and f.grad.norm() > 0


def test_cosine_loss():
    """L_cos of Eq. (5) against a loop over i and j != k."""
    f = torch.randn(3, 5, 4, dtype=torch.double)
    total = sum(cosine(f[j, i], f[k, i]) for i in range(5) for j in range(3) for k in range(3) if j != k)
    assert haba.cosine_loss(f).item() == pytest.approx(total / (3 * 3 * 5), rel=1e-9)


def test_draw_pair():
    """Each iteration's two hallucinators differ, and every pair comes up; one hallucinator: it alone."""
    pairs = [tuple(haba.draw_pair(4, 0, it)) for it in range(400)]
    assert set(pairs) == {(j, k) for j in range(4) for k in range(4) if j != k}
    assert haba.draw_pair(1, 0, 5) == [0]


# ------------------------------------------------------------------------------------------ preprocessing

def correlated_pixels(n=400):
    g = np.random.default_rng(1)
    mixed = g.normal(size=(n, 12)) @ g.normal(size=(12, 108)) * 25 + 128 + g.normal(0, 8, (n, 108))
    return torch.from_numpy(mixed.clip(0, 255).astype(np.uint8)).view(n, 3, 6, 6)


def test_zca(tmp_path):
    """The whitened training data's covariance is s / (s + 0.1) in the eigenbasis; undo brings
    pixels back; the cache gives the same without another eigendecomposition."""
    pixels = correlated_pixels()
    fitted = common.Preprocess.fit("noise", pixels, True, tmp_path)
    white = fitted(pixels)
    assert white.dtype == torch.float32 and white.shape == pixels.shape
    s, u = np.linalg.eigh(np.cov((pixels.numpy().reshape(400, -1) / 255).T))
    whitened = np.cov(white.double().flatten(1).numpy().T)
    assert np.abs(u.T @ whitened @ u - np.diag(s / (s + 0.1))).max() < 1e-4
    assert s.max() > 1 and s.min() < .01  # both ends of the ridge are seen
    assert torch.allclose(fitted.undo(white), pixels / 255, atol=1e-4)


def test_zca_cache(tmp_path, monkeypatch):
    """The matrix kept for the next run is the same, without another eigendecomposition; a broken one is replaced."""
    pixels = correlated_pixels()
    first = common.Preprocess.fit("noise", pixels, True, tmp_path)(pixels)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", None)
        again = common.Preprocess.fit("noise", pixels, True, tmp_path)
    assert torch.equal(again(pixels), first)
    for file in (tmp_path / ".cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(common.Preprocess.fit("noise", pixels, True, tmp_path)(pixels), first)


def test_whitened_images_kept(tmp_path, monkeypatch):
    """Whitened images are read from the file of the first call, to the bit, and can be written to without changing it;
    the same images in another order are whitened anew, and so are those of a file that is too short."""
    pixels = correlated_pixels()
    fitted = common.Preprocess.fit("noise", pixels, True, tmp_path)
    white, calls, whiten = fitted(pixels), [], common.Preprocess.__call__
    monkeypatch.setattr(common.Preprocess, "__call__", lambda *args: calls.append(1) or whiten(*args))
    for _ in range(2):
        kept = fitted.kept(pixels, tmp_path)
        assert torch.equal(kept, white) and kept.shape == pixels.shape
        kept += 1
    assert len(calls) == 1
    assert torch.equal(fitted.kept(pixels.flip(0), tmp_path), white.flip(0)) and len(calls) == 2
    for file in tmp_path.glob(".cache/*.float32"):
        file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(fitted.kept(pixels, tmp_path), white) and len(calls) == 3
    flat = common.Preprocess.fit("noise", pixels, False, tmp_path)
    assert torch.equal(flat.kept(pixels, tmp_path), flat(pixels)) and len(list(tmp_path.glob(".cache/*.float32"))) == 2


@pytest.mark.parametrize("zca", (True, False))
def test_fingerprint(zca, tmp_path):
    """The fingerprint does not depend on the images' order, and one pixel changed by one level changes it."""
    pixels = correlated_pixels()
    whole = common.Preprocess.fit("noise", pixels, zca, tmp_path).fingerprint
    shuffled = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    assert common.Preprocess.fit("noise", shuffled, zca, tmp_path).fingerprint == whole
    pixels[17, 1, 2, 3] ^= 1
    assert common.Preprocess.fit("noise", pixels, zca, tmp_path).fingerprint != whole
    assert common.Preprocess.fit("noise", pixels, not zca, tmp_path).fingerprint != whole


def test_standardise(tmp_path):
    """Data of the user's own get mean 0 and deviation 1 a channel; CIFAR-10 gets the published constants."""
    pixels = correlated_pixels()
    fitted = common.Preprocess.fit("noise", pixels, False, tmp_path)
    assert torch.allclose(fitted(pixels).mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(fitted(pixels).std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert torch.allclose(fitted.undo(fitted(pixels)), pixels / 255, atol=1e-5)
    cifar = common.Preprocess.fit("cifar10", pixels, False, tmp_path)(pixels)
    assert torch.allclose(cifar[:, 2], (pixels[:, 2] / 255 - .4465) / .2010, atol=1e-5)


# ------------------------------------------------------------------------------------------ DSA

TRANSFORMS = ("colour", "crop", "cutout", "flip", "scale", "rotate")


def test_dsa_draw():
    """Same key, same draw; another key, another; all six transforms about equally often; u uniform in [0, 1)."""
    draws = [common.draw_dsa(4, 0, step) for step in range(1200)]
    name, u = common.draw_dsa(4, 0, 77)
    assert name == draws[77][0] and torch.equal(u, draws[77][1]) and not torch.equal(u, draws[78][1])
    names = [name for name, _ in draws]
    assert set(names) == set(TRANSFORMS) and all(150 < names.count(name) < 250 for name in TRANSFORMS)
    u = torch.cat([u for _, u in draws])
    assert u.shape == (4800, 3) and 0 <= u.min() and u.max() < 1 and (u.mean(0) - .5).abs().max() < .02


@pytest.mark.parametrize("name", TRANSFORMS)
def test_dsa_siamese(name):
    """u with one row treats every image alike; with a row an image, as each image by itself with its row."""
    images, u = torch.randn(6, 3, 32, 32), uniform(6)
    shared = common.dsa(images[:1].expand(6, 3, 32, 32), name, u[:1])
    assert torch.equal(shared, shared[:1].expand_as(shared)) and shared.shape == images.shape
    own = common.dsa(images, name, u)
    alone = torch.cat([common.dsa(images[i:i + 1], name, u[i:i + 1]) for i in range(6)])
    assert torch.allclose(own, alone, atol=1e-5)
    assert not torch.allclose(own, common.dsa(images, name, u.flip(0)), atol=1e-3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_dsa_gradient(name):
    """Gradients reach the pixels and are the right ones: a finite difference in float64."""
    torch.manual_seed(0)
    images, u = torch.randn(3, 3, 16, 16, dtype=torch.double, requires_grad=True), uniform(3)
    weight, direction = torch.randn_like(images), torch.randn_like(images)
    (weight * common.dsa(images, name, u)).sum().backward()
    with torch.no_grad():
        up, down = ((weight * common.dsa(images + e * direction, name, u)).sum() for e in (1e-4, -1e-4))
    assert (images.grad * direction).sum().item() == pytest.approx(((up - down) / 2e-4).item(), rel=1e-4)
    assert images.grad.norm() > 0


def test_dsa_colour():
    """Brightness, saturation and contrast at given u against the README, in that order."""
    images = torch.randn(2, 3, 32, 32)
    grey, level = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    for u in (0., .1, .99):
        assert torch.allclose(common.dsa(images, "colour", uniform(2, u, .5, .5)), images + (u - .5) * 1.0, atol=1e-5)
        assert torch.allclose(common.dsa(images, "colour", uniform(2, .5, u, .5)), grey + (images - grey) * u * 2.0,
                              atol=1e-5)
        assert torch.allclose(common.dsa(images, "colour", uniform(2, .5, .5, u)), level + (images - level) * (u + .5),
                              atol=1e-5)
    bright = images + .3
    grey = bright.mean(1, keepdim=True)
    coloured = grey + (bright - grey) * .6
    level = coloured.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(common.dsa(images, "colour", uniform(2, .8, .3, .9)), level + (coloured - level) * 1.4, atol=1e-5)


def test_dsa_crop():
    """Crop shifts by -4 to 4 of 32 pixels along each axis, each shift as often, and puts zeros outside."""
    coded = torch.arange(1, 1025.).view(1, 1, 32, 32)  # each pixel tells where it came from
    down, right = [], []
    for out in common.dsa(coded.expand(1500, 1, 32, 32), "crop", uniform(1500))[:, 0]:
        row, column = out.nonzero()[0].tolist()
        origin = int(out[row, column]) - 1
        dy, dx = origin // 32 - row, origin % 32 - column
        expected = F.pad(coded[0, 0], (4, 4, 4, 4))[4 + dy:36 + dy, 4 + dx:36 + dx]
        assert torch.equal(out, expected)
        down.append(dy), right.append(dx)
    for shifts in (down, right):
        counts = np.bincount(np.array(shifts) + 4)
        assert len(counts) == 9 and counts.min() > 110  # 167 expected


def test_dsa_cutout():
    """Cutout sets one square to 0, 16x16 where it is inside, less at the border; every pixel is hit at times."""
    kept = common.dsa(torch.ones(1500, 1, 32, 32), "cutout", uniform(1500))[:, 0] != 0
    heights, widths = (~kept).any(2).sum(1), (~kept).any(1).sum(1)
    assert torch.equal((~kept).sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == 16 and heights.min() >= 8 and widths.min() >= 8
    assert not kept.all(0).any()
    images = torch.randn(50, 3, 32, 32)
    out = common.dsa(images, "cutout", uniform(50))
    assert torch.equal(out[out != 0], images[out != 0])


def test_dsa_flip():
    """Flip mirrors left and right with probability 0.5 and does nothing else."""
    images = torch.randn(2000, 1, 4, 4)
    out = common.dsa(images, "flip", uniform(2000))
    flipped = (out == images.flip(3)).all(3).all(2).all(1)
    assert torch.equal(out[~flipped], images[~flipped]) and .45 < flipped.float().mean() < .55


def slopes(name, count=1500):
    """Of images that hold their own x and y coordinates, d(x, y) / d(column, row) at the middle after `name`."""
    axis = torch.arange(32.)
    images = torch.stack([axis.expand(32, 32), axis[:, None].expand(32, 32)]).expand(count, 2, 32, 32) - 15.5
    out = common.dsa(images, name, uniform(count))
    assert out[:, :, 15:17, 15:17].mean((2, 3)).abs().max() < 1e-4  # the middle stays
    return out[:, :, 15, 16] - out[:, :, 15, 15], out[:, :, 16, 15] - out[:, :, 15, 15]


def test_dsa_scale():
    """Scale takes each axis by its own factor, uniform in [1/1.2, 1.2]."""
    along_columns, along_rows = slopes("scale")
    for factor, crossed in ((along_columns[:, 0], along_columns[:, 1]), (along_rows[:, 1], along_rows[:, 0])):
        assert 1 / 1.2 - 1e-4 < factor.min() < .85 and 1.18 < factor.max() < 1.2 + 1e-4
        assert abs(factor.mean() - (1.2 + 1 / 1.2) / 2) < .01 and crossed.abs().max() < 1e-4
    assert np.corrcoef(along_columns[:, 0], along_rows[:, 1])[0, 1] < .1


def test_dsa_rotate():
    """Rotate turns by up to 15 degrees either way, uniform, without a change of scale."""
    along_columns, along_rows = slopes("rotate")
    angle = torch.rad2deg(torch.atan2(along_columns[:, 1], along_columns[:, 0]))
    assert -15.01 < angle.min() < -14.5 and 14.5 < angle.max() < 15.01 and abs(angle.mean()) < 1
    assert torch.allclose(along_columns.norm(dim=1), torch.ones(1500), atol=1e-3)
    assert torch.allclose(along_rows, torch.stack([-along_columns[:, 1], along_columns[:, 0]], 1), atol=1e-3)


@pytest.mark.parametrize("name, flips", (("mnist", False), ("fashionmnist", False), ("svhn", False), ("noise", True)))
def test_no_flip_for_digits(name, flips, small_data, monkeypatch):
    """Experts and scored networks of MNIST, FashionMNIST and SVHN never see a flip."""
    small_data.name, seen = name, set()
    monkeypatch.setattr(common, "dsa", lambda images, kind, u: seen.add(kind) or images)
    list(common.expert_epochs(small_data, common.ConvNet(small_data.shape, 3), None, 40, ("expert",)))
    assert seen == set(TRANSFORMS if flips else set(TRANSFORMS) - {"flip"})
    seen.clear()
    common.train_and_test(small_data, lambda run, index, *key: (small_data.train[index], small_data.train_labels[index]),
                          3, epochs=40, runs=1)
    assert seen == set(TRANSFORMS if flips else set(TRANSFORMS) - {"flip"})


# ------------------------------------------------------------------------------------------ training and scoring

def drawer(data, seen=None):
    """draw(run, index, *key) for common.train_and_test: training images, the indices noted in `seen`."""
    def draw(run, index, *key):
        if seen is not None:
            seen.setdefault(run, []).append(index)
        return data.train[index], data.train_labels[index]
    return draw


def test_score_side_by_side(small_data, exact):
    """Networks trained side by side (as on a GPU) reach the accuracies of one after the other (a
    test image may fall on the other side by rounding); the same way twice gives the same to the last digit."""
    def score(side_by_side):
        return common.train_and_test(small_data, drawer(small_data), 30, lr=0.01, epochs=6, runs=3,
                                     side_by_side=side_by_side)

    one_by_one = score(False)
    assert score(False) == one_by_one and score(True) == pytest.approx(one_by_one, abs=100 / 90 + 1e-3)
    assert len(set(one_by_one)) > 1 and min(one_by_one) > 40  # three networks, and they learn


@pytest.fixture
def double():
    """New tensors and networks in float64: what matters shows above the rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_score_is_sgd(small_data, exact, double, monkeypatch):
    """train_and_test against a plain loop with nn.Module and torch.optim.SGD: momentum 0.9, weight decay 5e-4, mean
    cross-entropy over batches of 256 of a shuffled epoch, lr x 0.1 in the second half, the last network tested."""
    small_data.train, small_data.test = small_data.train.double(), small_data.test.double()
    small_data.train, small_data.train_labels = small_data.train.repeat(5, 1, 1, 1), small_data.train_labels.repeat(5)
    seen, kept, accuracy = {}, [], common.accuracy
    monkeypatch.setattr(common, "accuracy", lambda net, p, *rest: kept.append(p) or accuracy(net, p, *rest))
    found = common.train_and_test(small_data, drawer(small_data, seen), 300, common.PROTOCOL | {"augment": ()}, lr=0.02,
                                  epochs=4, runs=2, seed=6)
    for run in range(2):
        assert [len(index) for index in seen[run]] == [256, 44] * 4
        assert len(torch.cat(seen[run][:2]).unique()) == 300 and not torch.equal(seen[run][0], seen[run][2])
        net = common.seeded((6, "score", run), common.ConvNet, small_data.shape, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        for step, index in enumerate(seen[run]):
            if step == 4:  # epoch 3 of 4
                optimizer.param_groups[0]["lr"] = 0.002
            optimizer.zero_grad()
            F.cross_entropy(net(small_data.train[index]), small_data.train_labels[index]).backward()
            optimizer.step()
        flat = torch.cat([kept[run][name].flatten() for name, _ in net.named_parameters()])
        assert relative(flat, common.flat_parameters(net)) < 1e-6  # without weight decay: 3e-5
        right = (net(small_data.test).argmax(1) == small_data.test_labels).float().mean().item()
        assert found[run] == pytest.approx(100 * right, abs=1.2)


def test_expert_is_sgd(small_data, exact, monkeypatch):
    """An expert against a plain loop: SGD, lr 0.01, no momentum, no weight decay; parameters after every epoch."""
    monkeypatch.setattr(common, "dsa", lambda images, *draw: images)
    net = common.ConvNet(small_data.shape, 3)
    *_, trajectory = common.expert_epochs(small_data, net, None, 3, ("seed0", "expert000"))
    assert trajectory.shape == (4, sum(p.numel() for p in net.parameters()))
    plain = common.seeded(("seed0", "expert000"), common.ConvNet, small_data.shape, 3)
    for flat in trajectory:
        assert torch.allclose(flat, common.flat_parameters(plain), atol=1e-5)
        plain.zero_grad()
        F.cross_entropy(plain(small_data.train), small_data.train_labels).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.01 * p.grad
    assert (trajectory[0] - trajectory[3]).abs().max() > 1e-3


def test_expert_goes_on(small_data):
    """An expert that stopped after an epoch ends where the unbroken one does, bit for bit."""
    net, key = common.ConvNet(small_data.shape, 3), ("seed0", "expert000")
    trajectories = list(common.expert_epochs(small_data, net, None, 3, key))
    *_, again = common.expert_epochs(small_data, net, trajectories[0], 3, key)
    assert torch.equal(again, trajectories[-1])


def test_draw_start():
    """Start and target are M epochs apart on one expert; every expert and every t from 0 to max start comes up."""
    experts = (torch.arange(3.)[:, None] * 100 + torch.arange(6.))[:, :, None].expand(3, 6, 2)
    pairs = {tuple(float(v[0]) for v in common.draw_start(experts, dict(max_start=2, expert_epochs=3), 0, it))
             for it in range(300)}
    assert pairs == {(100. * k + t, 100. * k + t + 3) for k in range(3) for t in range(3)}


# ------------------------------------------------------------------------------------------ data and settings

def test_glyphs():
    """The drawn data set: balanced, the same each time, no test image among the training images, 10 classes."""
    train, labels = common.draw_glyphs(6, 0)
    test, test_labels = common.draw_glyphs(6, 1)
    assert train.shape == (60, 3, 32, 32) and train.dtype == torch.uint8
    assert labels.bincount().tolist() == test_labels.bincount().tolist() == [6] * 10 == [6] * len(common.GLYPHS)
    assert torch.equal(common.draw_glyphs(6, 0)[0], train)
    apart = (train[:, None].float() - test[None].float()).abs().mean((2, 3, 4))
    assert apart.min() > 5 and len(train.flatten(1).unique(dim=0)) == 60


def test_random_real(small_data):
    """`per_class` different training images of every class, in class order, another choice for another key."""
    images, labels = small_data.random_real(4, 0, "a")
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for image, label in zip(images, labels):
        index = (small_data.train == image).flatten(1).all(1).nonzero().item()
        assert small_data.train_labels[index] == label
    assert not torch.equal(images, small_data.random_real(4, 0, "b")[0])
    for wrong in (0, 21):
        with pytest.raises(common.UserError):
            small_data.random_real(wrong, 0)


def test_settings_for():
    """The nearest budget of the data set, in ratio; CIFAR-10's rows and no whitening for other data."""
    table = {("cifar10", n): dict(zca=True, row=n) for n in (1, 10, 50)} | {("cifar100", 1): dict(zca=True, row=100)}
    for name, budget, row, zca in (("cifar10", 9, 10, True), ("cifar10", 49, 50, True), ("cifar10", 1, 1, True),
                                   ("cifar10", 500, 50, True), ("cifar10", 3, 1, True), ("cifar10", 4, 10, True),
                                   ("cifar100", 49, 100, True), ("/some/folder", 9, 10, False)):
        found = common.settings_for(table, name, budget)
        assert (found["row"], found["zca"]) == (row, zca)
    for table in (haba.SETTINGS, __import__("mtt").SETTINGS):
        assert common.settings_for(table, "cifar10", 9) == table[("cifar10", 10)]
        assert common.settings_for(table, "cifar10", 49) == table[("cifar10", 50)]
