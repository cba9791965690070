"""HaBa: dataset distillation via factorization (Liu et al., NeurIPS 2022).

    python haba.py                                  # glyphs, drawn here: minutes on a CPU
    python haba.py --dataset cifar10 --bpc 9        # the paper's experiment: 100 experts, 15000 iterations

In place of images, HaBa stores bases (bpc a class) and a few hallucinators, small networks that all classes share.
Any basis through any hallucinator is a training image: |B| + |H| things stored, |B| x |H| images had. Bases and
hallucinators are learned together by matching training trajectories (MTT, see mtt.py): a student that trains for N
steps on hallucinated images should arrive where an expert on the real set arrived after M epochs (Eq. 7). An
adversary F keeps the hallucinators apart: F learns features in which the images of one basis look alike (Eq. 3, 4),
bases and hallucinators make them differ (Eq. 5).

Measured (short run, no paper budget): 44.5 +- 1.3 % on CIFAR-10 with --bpc 1 --experts 8 --lr-hallucinators 1
--iterations 250; the paper has 48.3 after 15,000. See the README.
"""
import argparse

import torch
import torch.nn.functional as F
from torch import nn

import common

METHOD = "haba"

# The authors' settings for a data set and bases a class. student_steps N, expert_epochs M, max_start: the last epoch t
# to start from, lr_bases eta_B, lr_hallucinators eta_H, lr_step: of the step size alpha, step_size: alpha at the start,
# batch: bases a student step (0: all). CIFAR-100: N, M and max start are MTT's, but whitened, and batches of 300 where
# there are more than 1,000 bases (Sec. 4.1). Other budgets and data sets take the nearest row of theirs or CIFAR-10's.
ROW = dict(zca=True, student_steps=30, expert_epochs=2, max_start=20, lr_bases=100., lr_hallucinators=100.,
           lr_step=1e-5, step_size=.01, batch=0)
SETTINGS = {
    ("cifar10", 1): ROW | dict(student_steps=50, max_start=2, lr_step=1e-7),
    ("cifar10", 10): ROW | dict(step_size=.001),
    ("cifar10", 50): ROW,
    ("cifar100", 1): ROW | dict(student_steps=20, expert_epochs=3),
    ("cifar100", 10): ROW | dict(student_steps=20),
    ("cifar100", 50): ROW | dict(student_steps=80, max_start=40, batch=300),
}
# A short run. At a small budget the hallucinators learn better at a hundredth of the paper's rate (see the README).
SETTINGS[("glyphs", 1)] = SETTINGS[("cifar10", 1)] | dict(
    experts=3, iterations=80, student_steps=30, expert_epochs=4, max_start=6, lr_hallucinators=1.)
PAPER = dict(  # supplement Tab. 7 and Sec. 4.1; experts and iterations from the authors' code
    experts=100, iterations=15000, hallucinators=5, depth=1, channels=None, basis_channels=None, basis_size=None,
    weight_dd=1., weight_cos=0.1, weight_con=0.1, weight_task=1., lr_adversary=0.001, learn_labels=False)


class Hallucinators(nn.Module):
    """|H| hallucinators side by side: enc -> scale and shift -> dec (Eq. 2), each with parameters of its own.

    shape (c, h, w) of an image, basis_shape (c', h', w') of a basis: a smaller one is enlarged bilinearly first. depth:
    conv-ReLU blocks in enc, mirrored in dec, whose last block has no ReLU since preprocessed images are signed. channels
    c'': of the first block (None: c at depth 1, 8 beyond). Between blocks the width doubles and the side halves: then
    depth 0 to 3 have the 6,144, 6,312, 10,963 and 16,131 parameters of supplement Tab. 3. The paper does not say how it
    halves and doubles the side: average pooling and nearest neighbours here. (The authors' code has no ReLU and no
    padding; the paper's counts are those with padding.)"""

    def __init__(self, count, shape, basis_shape, channels=None, depth=1):
        super().__init__()
        first = channels or (shape[0] if depth < 2 else 8)
        if depth == 0 and not basis_shape[0] == first == shape[0]:
            raise common.UserError("--depth 0 has no convolutions: leave out --channels and --basis-channels")
        if any(side % 2 ** max(depth - 1, 0) for side in shape[1:]):
            raise common.UserError(f"--depth {depth} halves the side {depth - 1} times, which {shape[1]} pixels do not "
                                   "allow: take a smaller --depth")
        widths = [first * 2 ** i for i in range(depth)]                               # 3, or 8 -> 16 -> 32
        h, w = (side // 2 ** max(depth - 1, 0) for side in shape[1:])                 # h'', w''
        self.shape, inside = tuple(shape), widths[-1] if depth else first
        self.encoder = self.conv_blocks(count, [basis_shape[0]] + widths)
        self.scale = nn.Parameter(torch.ones(count, inside, h, w))                    # sigma
        self.shift = nn.Parameter(torch.zeros(count, inside, h, w))                   # mu
        self.decoder = self.conv_blocks(count, widths[::-1] + [shape[0]] * bool(depth))

    @staticmethod
    def conv_blocks(count, widths):
        """3x3 convolutions widths[0] -> widths[1] -> ...: (count, out, in, 3, 3) and (count, out) each, initialised
        as nn.Conv2d does, uniform in +-1 / sqrt(fan-in)."""
        blocks = nn.ModuleList()
        for inside, outside in zip(widths, widths[1:]):
            bound = (9 * inside) ** -0.5
            blocks.append(nn.ParameterDict({"weight": torch.empty(count, outside, inside, 3, 3).uniform_(-bound, bound),
                                            "bias": torch.empty(count, outside).uniform_(-bound, bound)}))
        return blocks

    def forward(self, bases, which):
        """bases (B, c', h', w'), which: hallucinators' numbers, a list of J -> images (J, B, c, h, w), preprocessed.
        Hallucinators are the groups of one grouped convolution: no loop over them or over images."""
        def pick(parameter):  # a list as an index would be copied to the GPU, which waits for it
            return torch.cat([parameter[j] for j in which])

        def convolve(x, block):
            return F.conv2d(x, pick(block["weight"]), pick(block["bias"]), padding=1, groups=len(which))

        if bases.shape[2:] != self.shape[1:]:
            bases = F.interpolate(bases, self.shape[1:], mode="bilinear")
        x = bases.repeat(1, len(which), 1, 1)                                         # (B, J * c', h, w)
        for i, block in enumerate(self.encoder):                                      # f = enc(x)           Eq. (2)
            x = F.relu(convolve(F.avg_pool2d(x, 2) if i else x, block))
        x = pick(self.scale) * x + pick(self.shift)                                   # f~ = sigma * f + mu  Eq. (2)
        for i, block in enumerate(self.decoder):                                      # x~ = dec(f~)         Eq. (2)
            x = convolve(F.interpolate(F.relu(x), scale_factor=2) if i else x, block)
        return x.unflatten(1, (len(which), -1)).transpose(0, 1)


def contrastive_loss(features, labels=None, temperature=0.07):
    """L_con of Eq. (3) for features F_{-1}(x~_ij), (|H|, |B|, d), of the hallucinators and bases sampled.

    Features are brought to length 1 first, which a temperature of 0.07 presumes (both from the authors' code). With
    labels (|B|,): the supervised form (Khosla et al. 2020, Eq. 2) that the experiments use: all others of the same class
    are positive. Without: Eq. (3) itself, here to be read and tested; the positive of x~_ij is basis i under
    hallucinator k, over all j and k, j = k with them (the print leaves open whether it is)."""
    features = F.normalize(features, dim=2)
    count, bases, _ = features.shape
    if labels is None:
        similarity = torch.einsum("jid,kud->jkiu", features, features) / temperature
        return -similarity.log_softmax(3).diagonal(dim1=2, dim2=3).mean()
    anchors, labels = features.flatten(0, 1), labels.repeat(count)
    itself = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    log_share = (anchors @ anchors.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    return -(log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)).mean()


def cosine_loss(features):
    """L_cos of Eq. (5) for features (|H|, |B|, d): the cosine of one basis under two hallucinators j != k, summed over
    j and k, divided by |H|^2, mean over bases; |H| and |B| count what was sampled. (The authors' code takes
    (cos + 1) / 2 of its two hallucinators: the same gradient.)"""
    features = F.normalize(features, dim=2)
    cosine = torch.einsum("jid,kid->jki", features, features)
    return (cosine.sum() - cosine.diagonal(dim1=0, dim2=1).sum()) / (len(features) ** 2 * features.shape[1])


def distill(data, bpc, settings, seed, experts, checkpoint):
    """Factorise `data` into bpc bases a class and hallucinators (supplement Alg. 1) -> (tensors to store, step size,
    seconds of work). experts, checkpoint: as in common.load_experts and common.iterations. Raises common.UserError."""
    device, classes, count = data.device, len(data.classes), settings["hallucinators"]
    c, h, w = data.shape
    basis_shape = (settings["basis_channels"] or c, settings["basis_size"] or h, settings["basis_size"] or w)

    # line 1: bases start from real images, hallucinators and F at random
    bases, labels = data.random_real(bpc, seed, "bases")
    if basis_shape[0] != c:  # one channel: the mean over the colours
        bases = bases.mean(1, keepdim=True).repeat(1, basis_shape[0], 1, 1)
    if basis_shape[1:] != (h, w):
        bases = F.interpolate(bases, basis_shape[1:], mode="bilinear", antialias=True)
    bases = bases.requires_grad_()
    soft_labels = F.one_hot(labels, classes).float().requires_grad_() if settings["learn_labels"] else labels
    hallucinators = common.seeded((seed, "hallucinators"), Hallucinators, count, data.shape, basis_shape,
                                  settings["channels"], settings["depth"]).to(device)
    adversary = common.seeded((seed, "F"), common.ConvNet, data.shape, classes).to(device)
    student = common.ConvNet(data.shape, classes).to(device)
    step_size = torch.tensor(settings["step_size"], device=device, requires_grad=True)

    own_bases = [bases] + [soft_labels] * settings["learn_labels"]
    factors = own_bases + list(hallucinators.parameters())
    of_factors = torch.optim.SGD([{"params": own_bases, "lr": settings["lr_bases"]},
                                  {"params": hallucinators.parameters(), "lr": settings["lr_hallucinators"]}], momentum=0.95)
    of_step = torch.optim.SGD([step_size], lr=settings["lr_step"], momentum=0.9)  # momenta: the authors' code
    of_adversary = torch.optim.SGD(adversary.parameters(), lr=settings["lr_adversary"], momentum=0.9)  # eta_F
    state = {"bases": bases, "soft_labels": soft_labels, "hallucinators": hallucinators, "adversary": adversary,
             "step_size": step_size, "of_factors": of_factors, "of_step": of_step, "of_adversary": of_adversary}
    watch = {"loss": torch.zeros(())}

    same = common.identity(METHOD, data, bpc, settings, seed, experts)
    for it in common.iterations(settings["iterations"], checkpoint, same, state, watch):      # line 2
        start, target = common.draw_start(experts, settings, seed, it)

        # Lines 3 to 9. Alg. 1 pairs every basis of a batch with every hallucinator of a batch; the experiments send
        # each student step's batch through one hallucinator, drawn anew, and through DSA. Two hallucinators in one
        # iteration (Sec. 4.1) are for L_cos and F. What was not drawn moves on by its momentum alone.
        def batch(n):
            index = common.student_batch(len(bases), settings["batch"], n, seed, it, device=device)
            j = common.hash_int((seed, "hallucinator", it, n)) % count
            draw = common.draw_dsa(len(index), seed, it, n, device=device, flip=data.flip)
            return common.dsa(hallucinators(bases[index], [j])[0], *draw), soft_labels[index]

        # line 10: L_S = lambda_DD L_DD + lambda_cos L_cos, Eq. (6); L_DD is Eq. (7)
        of_factors.zero_grad()
        watch["loss"], step_size.grad = common.match_trajectory(student, start, target, step_size, batch,
                                                                settings["student_steps"])
        for leaf in [step_size, *factors]:
            leaf.grad.mul_(settings["weight_dd"])
        pair = draw_pair(count, seed, "pair", it)
        chosen = common.student_batch(len(bases), settings["batch"], 0, seed, it, "cosine", device=device)
        if len(pair) == 2 and settings["weight_cos"]:
            images = hallucinators(bases[chosen], pair)
            features = adversary.features(images.flatten(0, 1)).unflatten(0, (2, -1))
            (settings["weight_cos"] * cosine_loss(features)).backward()
        of_factors.step()                                                             # lines 11 and 12
        of_step.step()
        with torch.no_grad():
            step_size.clamp_(min=0.001)

        # lines 13 and 14: F learns the classes and to see one basis in its two hallucinations, Eq. (4). (The authors
        # add 0.1 (1 - cos) / 2 to it; the paper does not.) The images are composed anew: their factors have moved.
        with torch.no_grad():
            images = hallucinators(bases[chosen], pair)
        features = adversary.features(images.flatten(0, 1))
        of_adversary.zero_grad()
        loss_f = settings["weight_task"] * F.cross_entropy(adversary.classifier(features),
                                                           labels[chosen].repeat(len(pair)))
        loss_f = loss_f + settings["weight_con"] * contrastive_loss(features.unflatten(0, (len(pair), -1)), labels[chosen])
        loss_f.backward()
        of_adversary.step()

    tensors = {"bases": bases, "labels": soft_labels} | {f"hallucinators.{name}": p for name, p in
                                                         hallucinators.named_parameters()}
    return {name: tensor.detach() for name, tensor in tensors.items()}, step_size.item(), watch["seconds"]


def draw_pair(count, *key):
    """Two different hallucinators ("random 2 hallucinators in one iteration", Sec. 4.1), or the only one."""
    first, skip = common.hash_int((*key, "first")) % count, common.hash_int((*key, "skip")) % max(count - 1, 1)
    return [first, (first + 1 + skip) % count][:count]


def hallucinate(distilled, device="cpu"):
    """All images of a distilled file -> (|H|, |B|, c, h, w) preprocessed, labels (|B|,) or soft (|B|, C)."""
    weights = {name.removeprefix("hallucinators."): tensor for name, tensor in distilled.items()
               if name.startswith("hallucinators.")}
    bases, count = distilled["bases"].to(device), len(weights["scale"])
    depth = sum(name.startswith("encoder.") for name in weights) // 2
    channels = weights["encoder.0.bias"].shape[1] if depth else None
    hallucinators = Hallucinators(count, distilled["shape"], bases.shape[1:], channels, depth).to(device)
    hallucinators.load_state_dict(weights)
    with torch.no_grad():
        return hallucinators(bases, list(range(count))), distilled["labels"].to(device)


def sampler(distilled, device):
    """What common.score draws batches from: (draw(run, index, *key) -> images, labels; number of entries). Each basis
    drawn goes through one hallucinator drawn at random: an epoch is as long as the number of bases."""
    images, labels = hallucinate(distilled, device)

    def draw(run, index, *key):
        which = torch.randint(len(images), (len(index),), generator=common.rng(*key, "which", device=device),
                              device=device)
        return images[which, index], labels[index]

    return draw, images.shape[1]


def picture(path, data, distilled):
    """One row a class with up to three bases: each basis, then what every hallucinator makes of it (paper Fig. 4). The
    network's norm takes nearly all brightness and contrast out, so these are free and drift: for the eye, each
    hallucinator's images are brought to the mean and deviation of the real ones, channel by channel."""
    images, _ = hallucinate(distilled, data.device)
    mean, std = (getattr(data.train[::50], stat)((0, 2, 3), keepdim=True) for stat in ("mean", "std"))
    images = (images - images.mean((1, 3, 4), keepdim=True)) / (images.std((1, 3, 4), keepdim=True) + 1e-6) * std + mean
    bases = F.interpolate(distilled["bases"].to(data.device), data.shape[1:], mode="bilinear")
    bases = bases if bases.shape[1] == data.shape[0] else bases.mean(1, keepdim=True).expand(-1, data.shape[0], -1, -1)
    rows = torch.cat([bases[None], images]).transpose(0, 1)                           # (|B|, 1 + |H|, c, h, w)
    rows = rows.unflatten(0, (len(data.classes), -1))[:, :3]
    common.save_picture(path, data, rows.flatten(0, 2), per_row=rows.shape[1] * rows.shape[2])


def main():
    parser = argparse.ArgumentParser(description="Distil a data set into bases and hallucinators (HaBa).",
                                     formatter_class=common.HelpFormatter)
    common.add_arguments(parser, "bpc", "bases a class, |B| / C")
    common.add_trajectory_arguments(parser, "15000")
    add = parser.add_argument
    add("--hallucinators", type=common.positive, help="|H|: number of hallucinators (5)")
    add("--depth", type=int, choices=range(6), help="conv-ReLU blocks in enc and in dec (1)")
    add("--channels", type=common.positive, help="c'': channels inside a hallucinator (as an image; from --depth 2 on 8)")
    add("--basis-channels", type=common.positive, help="c': channels of a basis (as an image)")
    add("--basis-size", type=common.positive, help="h' = w': side of a basis (as an image)")
    add("--lr-bases", type=common.amount, help="eta_B: learning rate of the bases (100)")
    add("--lr-hallucinators", type=common.amount, help="eta_H: learning rate of the hallucinators (100)")
    add("--weight-dd", type=common.amount, help="lambda_DD: weight of trajectory matching, Eq. 6 (1)")
    add("--weight-cos", type=common.amount, help="lambda_cos: weight of the cosine term, Eq. 6 (0.1)")
    add("--weight-con", type=common.amount, help="lambda_con: weight of the contrastive loss of F, Eq. 4 (0.1)")
    add("--weight-task", type=common.amount, help="lambda_task: weight of cross-entropy of F, Eq. 4 (1)")
    add("--learn-labels", action="store_true", default=None, help="learn y^ as well: Alg. 1, line 12, optional (off)")
    args = parser.parse_args()
    settings = common.merge_settings(PAPER | common.settings_for(SETTINGS, args.dataset, args.bpc), args)

    data, experts, path = common.prepare_trajectories(METHOD, args, args.bpc, settings)
    tensors, step_size, seconds = distill(data, args.bpc, settings, args.seed, experts, path.with_suffix(".ckpt"))
    distilled = common.save_distilled(path, data, METHOD, args.bpc, tensors, step_size, settings, seconds, args.seed)
    picture(path.with_suffix(".png"), data, distilled)
    print(f"wrote {path} and {path.with_suffix('.png')}")
    common.score(data, distilled, *sampler(distilled, data.device), args.out, args.epochs, args.runs, args.seed)


if __name__ == "__main__":
    common.run(main)
