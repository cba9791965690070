"""KFS: dataset condensation with latent space knowledge factorization and sharing (Lee, Lee & Hwang 2022).

    python kfs.py                                             # glyphs, drawn here: minutes on a CPU
    python kfs.py --dataset cifar10 --ipc 1 --real-means 24 --iterations 800 --drops 600 740     # half an hour on a CPU
    python kfs.py --dataset cifar10 --ipc 1                   # the paper's experiment: 20000 iterations, a GPU

In place of images, KFS stores small latent codes (M a class) and D tiny decoders that all classes share. Any code
through any decoder is a training image: M x D images a class for the storage of a few. Both are learned together by
matching distributions (DM, see dm.py), over all real and all synthetic images: with g(x) the features of a ConvNet
with random parameters, new ones in every iteration,

    L = 1/C sum_c 1/2 || 1/N sum_n g(x_cn) - 1/(DM) sum_d sum_m g(f(theta_cm; phi_d)) ||^2          (Eq. 1)

A sample of the synthetic images in the second mean gives a biased gradient (Eq. 2), a sample of the real images in
the first a noisy one (Eq. 3); --sample-decoders and --batch-real do both, to see the effect (Fig. 7).
Used afterwards, codes are decoded as they are needed and train a fresh network for 200 epochs of M x D images a class.

Measured (short run): 57.9 +- 0.1 % on CIFAR-10 with the second command, scored with 3 networks; the paper has 59.8 after
20,000 iterations. See the README.
"""
import argparse
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn

import common

METHOD = "kfs"
# Appendix A: how a result is scored. (DSA, as for the field's other methods: the paper names no augmentation.)
PROTOCOL = common.PROTOCOL | dict(epochs=200, drops=((133 / 200, 0.2), (166 / 200, 0.2)))

# iterations, lr_codes, lr_decoders (Adam): appendix A. drops: iterations at which both rates fall to 0.2 of what they
# were (CIFAR-100 in phases: 5000 15000). pretrain: steps; noise: on the copies of the pre-trained decoder, in parts of
# the weights' root mean square. relu: between a decoder's layers (the tables print none). dsa: augment both sides in the
# matching (Eq. 1 names none). real_means: K stored networks, 0: a new network in every iteration. batch_real,
# sample_decoders, backprop: 0: all.
PAPER = dict(zca=False, iterations=20000, lr_codes=.1, lr_decoders=.01, drops=(), pretrain=2000, noise=.1, relu=False,
             dsa=False, real_means=0, batch_real=0, sample_decoders=0, backprop=0)
# Appendix B. The paper matches and scores these subsets with ResNetAP-10; here it is the ConvNet.
IMAGENET = dict(kernel=4, iterations=50000, lr_codes=.01, lr_decoders=.001, drops=(30000, 42000, 48000))
SHORT = dict(decoders=4, iterations=60, pretrain=500, real_means=6)  # for glyphs


def layout(shape, ipc):
    """What is stored for images `shape` (c, h, w) and the storage of ipc images a class -> settings.

    code: shape of a code; codes: M, as many as fit; decoders: D; channels: a decoder's, from the code's end on; kernel.
    Sides are rounded up (what a decoder makes too large is cropped). The paper's Tables 6 and 9 are lost: it prints 16
    codes of 12x4x4, 8 decoders 12-9-6-3 (Low-R, Table 4, 7) for one image of 3x32x32, and the rest is our choice within
    the same storage: High-R (Table 5, 8) from 10 images a class on, D = 8 everywhere. Settings of Tables 1 and 3:

        data set             images  code      M    decoder      overhead ("O-P.", the decoders)
        SVHN, CIFAR-10          1    12x4x4    16   12-9-6-3 k2  19.2 %
        SVHN, CIFAR-10         10    12x8x8    40   12-6-3   k2   1.0 %
        SVHN, CIFAR-10         50    12x8x8   200   12-6-3   k2   0.2 %
        CIFAR-100               1    12x4x4    16   12-9-6-3 k2   1.9 %
        CIFAR-100              10    12x8x8    40   12-6-3   k2   0.1 %
        Tiny ImageNet           1    12x8x8    16   12-9-6-3 k2   0.2 %
        Tiny ImageNet          10    12x16x16  40   12-6-3   k2   0.0 %
        ImageNet subsets, 224   1    12x28x28  16   12-9-6-3 k4   1.5 %
        ImageNet subsets, 224  10    12x56x56  40   12-6-3   k4   0.1 %

    (Sec. 3.1 counts 3131 numbers and less than 2 % for 8 decoders and 10 classes, which holds for 100; Sec. 4 counts
    73.8, which is one decoder. It also prints 16 x 12 x 4 x 4 = 30720, which is 3072.)"""
    c, h, w = shape
    cell = 8 if ipc < 10 else 4
    code = (4 * c, math.ceil(h / cell), math.ceil(w / cell))
    row = dict(code=code, codes=max(1, ipc * math.prod(shape) // math.prod(code)), decoders=8, kernel=2,
               channels=(3 * c, 2 * c) if cell == 8 else (2 * c,))
    return row | (IMAGENET if h > 64 else {})


def settings_of(name, shape, ipc):
    """The settings for a data set's name, image shape and budget."""
    return PAPER | layout(shape, ipc) | (SHORT if name == "glyphs" else {})


class Decoders(nn.Module):
    """D decoders side by side (Table 4, 5, 7, 8): transposed convolutions of stride 2 and a sigmoid, which gives
    pixels; then they are standardised with the data set's `mean` and `std` (lists).

    widths (c', ..., c): channels from the code to the image; size (h, w) of an image. 12 -> 9 -> 6 -> 3 with kernel 2
    has 738 parameters a decoder."""

    def __init__(self, count, widths, kernel, size, mean, std, relu=False):
        super().__init__()
        self.size, self.pad, self.relu = tuple(size), (kernel - 2) // 2, relu
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inside, outside in zip(widths, widths[1:]):
            bound = (outside * kernel ** 2) ** -0.5  # as nn.ConvTranspose2d starts
            self.weights.append(torch.empty(count, inside, outside, kernel, kernel).uniform_(-bound, bound))
            self.biases.append(torch.empty(count, outside).uniform_(-bound, bound))

    def forward(self, codes, which=None):
        """f(theta; phi): codes (B, c', h', w') -> images (B, D, c, h, w), preprocessed. which: a tensor with the
        numbers of the decoders to take (D' of them) in place of all."""
        count = len(self.weights[0]) if which is None else len(which)
        return self.standardise(self.decode(codes.repeat(1, count, 1, 1), which).unflatten(1, (count, -1)))

    def pairs(self, codes, which):
        """Each code (B, c', h', w') through the one decoder that which (B,) names -> images (B, c, h, w)."""
        return self.standardise(self.decode(codes.flatten(0, 1)[None], which)[0].unflatten(0, (len(which), -1)))

    def decode(self, x, which):
        """Decoders are the groups of one grouped convolution a layer: no loop over them or over codes."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            weight, bias = (weight, bias) if which is None else (weight[which], bias[which])
            x = F.conv_transpose2d(F.relu(x) if i and self.relu else x, weight.flatten(0, 1), bias.flatten(), stride=2,
                                   padding=self.pad, groups=len(weight))
        (h, w), (top, left) = self.size, ((have - want) // 2 for have, want in zip(x.shape[2:], self.size))
        return x[:, :, top:top + h, left:left + w]

    def standardise(self, x):
        return (x.sigmoid() - self.mean) / self.std


def build_decoders(data, settings, count):
    """`count` decoders for `data`, at random."""
    widths = (settings["code"][0], *settings["channels"], data.shape[0])
    mean, std = (v.flatten().tolist() for v in (data.preprocess.mean, data.preprocess.std))
    return Decoders(count, widths, settings["kernel"], data.shape[1:], mean, std, settings["relu"])


def pretrain(data, settings, seed, fixed=None):
    """Appendix A: one decoder as an auto-encoder, copied to all D -> codes Theta (C, M, c', h', w'), Decoders.
    The encoder mirrors the decoder and is thrown away, codes start as encoded real images: our choice, the paper does
    not say. fixed: Decoders that stay as they are; the encoder then learns codes that they decode to the image."""
    device, (c, h, w) = data.device, data.shape
    kernel, widths = settings["kernel"], (c, *reversed(settings["channels"]), settings["code"][0])
    layers = []
    for inside, outside in zip(widths, widths[1:]):
        layers += [nn.ReLU()] * (bool(layers) and settings["relu"])
        layers.append(common.seeded((seed, "encoder", inside), nn.Conv2d, inside, outside, kernel, stride=2,
                                    padding=(kernel - 2) // 2))
    encoder = nn.Sequential(*layers).to(device)
    down, right = (side * 2 ** (len(widths) - 1) - have for side, have in zip(settings["code"][1:], (h, w)))
    border = (right // 2, right - right // 2, down // 2, down - down // 2)

    def encode(images):
        return encoder(F.pad(images, border, mode="replicate"))

    decoders = fixed or common.seeded((seed, "decoder"), build_decoders, data, settings, 1).to(device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoders.parameters()], lr=0.01)  # fixed ones have no gradient
    progress = common.Progress(settings["pretrain"], "pre-training steps")
    for step in range(settings["pretrain"]):
        index = torch.randint(len(data.train), (256,), generator=common.rng(seed, "auto-encoder", step, device=device),
                              device=device)
        images = data.train[index]
        decoded = decoders(encode(images))
        loss = F.mse_loss(decoded, images[:, None].expand_as(decoded))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(1, lambda: f"error {loss.item():.4f}")
    progress.end()

    with torch.no_grad():
        images, _ = data.random_real(settings["codes"], seed, "codes")
        codes = torch.cat([encode(x) for x in images.split(1024)]).unflatten(0, (len(data.classes), -1))
        if fixed is None:
            # Equal decoders would get equal gradients from Eq. (1) and stay equal for ever: noise sets them apart.
            one, decoders = decoders, build_decoders(data, settings, settings["decoders"]).to(device)
            for i, (p, pretrained) in enumerate(zip(decoders.parameters(), one.parameters())):
                noise = torch.randn(p.shape, generator=common.rng(seed, "noise", i)).to(device)
                p.copy_(pretrained + settings["noise"] * pretrained.square().mean().sqrt() * noise)
    return codes, decoders


def load_real_means(data, data_dir, count, dsa):
    """`count` random networks and the class means of their features over the whole real set (Sec. 3.2), computed where
    they are missing. -> weights (K, P), means (K, C, F), K draws of DSA (None without), on data.device: for CIFAR-10 1.4
    MB a network. One file a network under data_dir, for all later runs, whatever their seed and device."""
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device).requires_grad_(False)
    setting = (data.preprocess.fingerprint, net.depth, dsa, data.shape, data.classes, data.train_labels.bincount().tolist())
    folder = pathlib.Path(data_dir) / "real_means" / f"{data.name}_{common.hash_int(setting):016x}"
    found = []
    progress = common.Progress(count, "real means")
    for k in range(count):
        path, draw = folder / f"network{k:05d}.pt", None
        if dsa:  # the Siamese draw of network k, the same on every device
            name, u = common.draw_dsa(1, "real means", k, flip=data.flip)
            draw = name, u.to(data.device)
        if path.exists():
            stored = common.load(path, "means of real features")
            progress.skip(1)
        else:
            common.start_anew(net, "real means", k)
            means = common.mean_features(net, data.train, data.train_labels, len(data.classes), draw)
            stored = {"weights": common.flat_parameters(net).cpu(), "means": means.cpu()}
            common.save(stored, path)
            progress(1)
        found.append((stored["weights"], stored["means"], draw))
    progress.end()
    weights, means, draws = zip(*found)
    return torch.stack(weights).to(data.device), torch.stack(means).to(data.device), draws


def matching_loss(net, real_means, codes, decoders, draw=None, which=None, chosen=None, half=True):
    """Eq. (1) for real_means (C, F) -> L, 0-d; its gradient has been added to .grad of codes and decoders.

    codes (C, M, ...) -> images, all codes x decoders, in class order. draw: a Siamese draw of DSA. which: numbers of
    the decoders to take, the biased variant of Eq. (2). chosen (C, m): the codes of each class to go back through: the
    mean is over all M, the gradient scaled by M / m and so unbiased (Sec. 3.2, "Full batch training")."""
    def images(codes):
        x = decoders(codes.flatten(0, 1), which).flatten(0, 1)
        return common.dsa(x, *draw) if draw else x

    rows = torch.arange(len(codes), device=codes.device)[:, None]
    part = images(codes if chosen is None else codes[rows, chosen])
    with torch.no_grad():
        every = part if chosen is None else images(codes)
    distance, gradient = common.match_means(net, real_means, every, None if chosen is None else part, half=half)
    part.backward(gradient / (2 * len(codes)))
    return distance.sum() / (2 * len(codes))


def distill(data, ipc, settings, seed, checkpoint, real_means=None, fixed=None):
    """Condense `data` into codes and decoders -> (codes (C, M, c', h', w'), Decoders, seconds of work).

    real_means: what load_real_means gives, or None. fixed: Decoders of an earlier phase, which stay as they are: the
    class-incremental setting of appendix A; codes alone are learned. checkpoint: a path; a run that was killed goes on
    from it. Raises common.UserError as common.iterations does."""
    classes, device, count = len(data.classes), data.device, settings["decoders"]
    net = common.ConvNet(data.shape, classes).to(device).requires_grad_(False)
    going_on = pathlib.Path(checkpoint).exists()  # then it replaces what pre-training would give
    codes, decoders = pretrain(data, settings | {"pretrain": 0} if going_on else settings, seed, fixed)
    codes.requires_grad_()
    decoders.requires_grad_(fixed is None)
    rates = settings["lr_codes"], settings["lr_decoders"]
    optimizer = torch.optim.Adam([{"params": [codes]}, {"params": [*decoders.parameters()]}])  # fixed: no gradient
    members, smallest = common.class_members(data)
    batch_real = min(settings["batch_real"], smallest)
    batch_labels = torch.arange(classes, device=device).repeat_interleave(batch_real)
    watch = {"loss": torch.zeros(())}

    norm = None if fixed is None else common.flat_parameters(fixed).double().norm().item()
    same = common.identity(METHOD, data, ipc, settings | {"fixed decoders": norm}, seed)
    state = {"codes": codes, "decoders": decoders, "optimizer": optimizer}
    for it in common.iterations(settings["iterations"], checkpoint, same, state, watch):
        if real_means is not None:
            weights, means, draw = (part[it % len(part)] for part in real_means)
            nn.utils.vector_to_parameters(weights, net.parameters())
        else:
            common.start_anew(net, seed, "network", it)
            draw = common.draw_dsa(1, seed, it, device=device, flip=data.flip) if settings["dsa"] else None
            if batch_real:                                             # the noisy variant of Eq. (3)
                index = common.draw_members(members, batch_real, seed, "real", it)
                means = common.mean_features(net, data.train[index], batch_labels, classes, draw)
            else:
                means = common.mean_features(net, data.train, data.train_labels, classes, draw)

        which = chosen = None
        if 0 < settings["sample_decoders"] < count:                    # the biased variant of Eq. (2)
            which = random_order((count,), settings["sample_decoders"], seed, "decoders", it, device=device)
        if 0 < settings["backprop"] < settings["codes"]:
            chosen = random_order(codes.shape[:2], settings["backprop"], seed, "backprop", it, device=device)
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr * 0.2 ** sum(it >= drop for drop in settings["drops"])
        optimizer.zero_grad()
        watch["loss"] = matching_loss(net, means, codes, decoders, draw, which, chosen)  # Eq. (1)
        optimizer.step()

    return codes.detach(), decoders.requires_grad_(False), watch["seconds"]


def distill_to_file(path, data, ipc, settings, seed, data_dir, fixed=None):
    """The whole run: stored real means where settings ask for them (under data_dir), distillation (its checkpoint beside
    `path`), distilled file `path`, whose settings tell of its storage and diversity too -> what the file holds. fixed: as
    in distill. Raises common.UserError."""
    began, real_means = time.time(), None
    if settings["real_means"]:
        real_means = load_real_means(data, data_dir, settings["real_means"], settings["dsa"])
    found = {"real_means_seconds": round(time.time() - began, 1)}
    codes, decoders, seconds = distill(data, ipc, settings, seed, path.with_suffix(".ckpt"), real_means, fixed)
    tensors = {"codes": codes} | {f"decoders.{name}": p for name, p in decoders.named_parameters()}
    found |= storage(settings, data.shape, ipc, len(data.classes)) | diversity(codes, decoders)
    return common.save_distilled(path, data, METHOD, ipc, tensors, None, settings | found, seconds, seed)


def random_order(shape, first, *key, device):
    """The first `first` of a random order of 0 .. shape[-1] - 1, for every row, drawn on the device."""
    return torch.rand(shape, generator=common.rng(*key, device=device), device=device).argsort(-1)[..., :first]


def open_decoders(distilled, device="cpu"):
    """The codes (C, M, c', h', w') and Decoders of a distilled file."""
    weights = {name.removeprefix("decoders."): t for name, t in distilled.items() if name.startswith("decoders.")}
    layers = [weights[f"weights.{i}"] for i in range(len(weights) // 2)]
    widths = (*(layer.shape[1] for layer in layers), layers[-1].shape[2])
    decoders = Decoders(len(layers[0]), widths, layers[0].shape[-1], distilled["shape"][1:], distilled["mean"],
                        distilled["std"], distilled["settings"]["relu"])
    decoders.load_state_dict(weights)
    return distilled["codes"].to(device), decoders.to(device).requires_grad_(False)


def sampler(distilled, device):
    """What common.score draws batches from: (draw(run, index, *key) -> images, labels; number of entries). An entry is
    a code with a decoder, decoded as it is used: an epoch is all M x D images of all classes."""
    codes, decoders = open_decoders(distilled, device)
    (classes, m), count = codes.shape[:2], len(decoders.weights[0])

    def draw(run, index, *key):
        code = index // count
        return decoders.pairs(codes.flatten(0, 1)[code], index % count), code // m

    return draw, classes * m * count


def storage(settings, shape, ipc, classes):
    """What is stored -> dict(numbers_per_class, overhead_percent): codes, and a share of the decoders; the overhead
    is over the storage of ipc images a class ("O-P.")."""
    widths = (settings["code"][0], *settings["channels"], shape[0])
    decoder = sum(i * o * settings["kernel"] ** 2 + o for i, o in zip(widths, widths[1:]))
    numbers = settings["codes"] * math.prod(settings["code"]) + settings["decoders"] * decoder / classes
    return {"numbers_per_class": numbers, "overhead_percent": round(100 * (numbers / (ipc * math.prod(shape)) - 1), 2)}


@torch.no_grad()
def diversity(codes, decoders):
    """How images differ: the root mean square over pixels (preprocessed) and pairs -> dict(between_decoders: one code
    under two decoders; between_codes: two codes of a class under one decoder)."""
    spread = []
    for images in map(decoders, codes):  # (M, D, c, h, w); over pairs the mean square difference is twice the variance
        spread.append([2 * images.var(axis, correction=int(images.shape[axis] > 1)).mean() for axis in (1, 0)])
    found = torch.tensor(spread).mean(0).sqrt().tolist()
    return dict(zip(("between_decoders", "between_codes"), (round(value, 4) for value in found)))


def picture(path, data, codes, decoders):
    """Codes down (up to two a class), decoders across (Fig. 3)."""
    with torch.no_grad():
        images = decoders(codes[:, :2].flatten(0, 1))
    common.save_picture(path, data, images.flatten(0, 1), per_row=images.shape[1])


def main():
    parser = argparse.ArgumentParser(description="Condense a data set into latent codes and shared decoders (KFS).",
                                     formatter_class=common.HelpFormatter)
    common.add_arguments(parser, "ipc", "storage, in images a class")
    add = parser.add_argument
    add("--iterations", type=common.positive, help="distillation iterations (20000)")
    add("--real-means", type=common.positive, help="K: reuse K networks, their real means stored (a new one each time)")
    add("--decoders", type=common.positive, help="D: number of decoders (8)")
    add("--fixed-decoders", help="a file of kfs.py whose decoders stay: class-incremental, App. A; --drops 5000 15000")
    add("--sample-decoders", type=common.positive, help="decoders in an iteration: biased, Eq. 2 (all)")
    add("--batch-real", type=common.positive, help="real images a class in an iteration: noisy, Eq. 3 (all)")
    add("--backprop", type=common.positive, help="codes a class to go back through, when memory is short (all)")
    add("--lr-codes", type=common.amount, help="learning rate of the codes, Adam (0.1)")
    add("--lr-decoders", type=common.amount, help="learning rate of the decoders, Adam (0.01)")
    add("--drops", type=common.positive, nargs="*", help="iterations at which both fall to a fifth (none)")
    add("--pretrain", type=common.positive, help="steps of the auto-encoder (2000)")
    add("--noise", type=common.amount, help="on the copies of the pre-trained decoder, relative (0.1)")
    add("--relu", action="store_true", default=None, help="ReLU between a decoder's layers (off)")
    add("--dsa", action="store_true", default=None, help="augment both sides in the matching (off)")
    args = parser.parse_args()
    args.drops = None if args.drops is None else tuple(args.drops)
    if args.real_means and args.batch_real:
        raise common.UserError("--real-means are means over all real images: leave out --batch-real or --real-means")

    path = common.output_path(METHOD, args, f"ipc{args.ipc}")
    data = common.load_dataset(args.dataset, args.data_dir, False, args.size, common.pick_device(args.device))
    settings = common.merge_settings(settings_of(data.name, data.shape, args.ipc), args)
    if args.batch_real:
        settings["real_means"] = 0
    settings["codes"] = min(settings["codes"], common.class_members(data)[1])  # not more codes than real images
    fixed = None
    if args.fixed_decoders:
        fixed = fixed_decoders(args.fixed_decoders, data, settings)
        settings |= {"decoders": len(fixed.weights[0]), "relu": fixed.relu}
    takes = storage(settings, data.shape, args.ipc, len(data.classes))
    print(f"{settings['codes']} codes of {'x'.join(map(str, settings['code']))} a class and {settings['decoders']} "
          f"decoders: {takes['numbers_per_class']:.1f} numbers a class, {takes['overhead_percent']:+.2f} % of "
          f"{args.ipc} image{'s' * (args.ipc > 1)} a class (O-P.)", flush=True)

    distilled = distill_to_file(path, data, args.ipc, settings, args.seed, args.data_dir, fixed)
    print(f"images of one code differ by {distilled['settings']['between_decoders']} between decoders, of one decoder by "
          f"{distilled['settings']['between_codes']} between codes of a class (root mean square)")
    picture(path.with_suffix(".png"), data, *open_decoders(distilled, data.device))
    print(f"wrote {path} and {path.with_suffix('.png')}")
    common.score(data, distilled, *sampler(distilled, data.device), args.out, args.epochs, args.runs, args.seed,
                 PROTOCOL)


def fixed_decoders(path, data, settings):
    """The Decoders of a distilled file, for other classes of the same kind of images. Raises common.UserError."""
    distilled = common.load_distilled(path)
    if distilled["method"] != METHOD or tuple(distilled["codes"].shape[2:]) != tuple(settings["code"]) \
            or tuple(distilled["shape"]) != data.shape:
        raise common.UserError(f"{path} has no decoders for codes {tuple(settings['code'])} and images {data.shape}: "
                               "give a file of kfs.py made with the same --ipc and image size")
    decoders = open_decoders(distilled, data.device)[1]
    decoders.mean, decoders.std = data.preprocess.mean, data.preprocess.std  # of these data
    return decoders


if __name__ == "__main__":
    common.run(main)
