"""HaBa: dataset distillation via factorization (Liu et al., NeurIPS 2022).

    python haba.py                                  # glyphs, drawn here: minutes on a CPU
    python haba.py --dataset cifar10 --bpc 9        # the paper's experiment: 100 experts, 15000 iterations
    python haba.py --dataset cifar10 --bpc 9 --objective dm         # or dc: other losses in place of MTT's (Tab. 2)

In place of images, HaBa stores bases (bpc a class) and a few hallucinators, small networks that all classes share.
Any basis through any hallucinator is a training image: |B| + |H| things stored, |B| x |H| images had. Bases and
hallucinators are learned together by matching training trajectories (MTT, see mtt.py): a student that trains for N
steps on hallucinated images should arrive where an expert on the real set arrived after M epochs (Eq. 7). An
adversary F keeps the hallucinators apart: F learns features in which the images of one basis look alike (Eq. 3, 4),
bases and hallucinators make them differ (Eq. 5). In MTT's place DM matches the classes' mean features (see dm.py), DC
the gradients that they give a network in training (Zhao et al. 2020, with DSA; survey Sec. 4.1).

Measured (short run, 400 of the paper's 15,000 iterations): 46.3 +- 0.5 % on CIFAR-10 with --bpc 1 --experts 14
--lr-hallucinators 1 --expert-epochs 1 --step-size 0.005 --iterations 400; the paper has 48.3. See the README.
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
# Experts, iterations, momentum (of bases and hallucinators): their code's.
ROW = dict(zca=True, experts=100, iterations=15000, student_steps=30, expert_epochs=2, max_start=20, lr_bases=100.,
           lr_hallucinators=100., momentum=.95, lr_step=1e-5, step_size=.01, batch=0, learn_labels=False, compile=False)
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
# "Other settings hold the same as the baseline" (Sec. 4.1): DM's and DC's, which do not whiten (though Sec. 4.1 whitens
# "before all the experiments"). eta_H = eta_B is the paper's rule, but DM's hallucinators grew from 0.1 to 270 in 30
# iterations at 1. batch_real: real images a class. matches: iterations with one network, which in between trains for
# net_epochs of hallucinated images at lr_net and momentum_net (Eq. 20 has none). DC counts 1,000 networks' matches.
DM_ROW = dict(zca=False, iterations=20000, lr_bases=1., lr_hallucinators=.001, momentum=.5, batch=256, batch_real=256,
              matches=1)
DC_ROW = DM_ROW | dict(lr_bases=.1, lr_net=.01, momentum_net=.5)
DM_SETTINGS = {("cifar10", 1): DM_ROW, ("glyphs", 1): DM_ROW | dict(iterations=100, batch_real=64)}
DC_SETTINGS = {("cifar10", n): DC_ROW | dict(iterations=1000 * n, matches=n, net_epochs=epochs)
               for n, epochs in ((1, 0), (10, 50), (50, 10))}
DC_SETTINGS[("glyphs", 1)] = DC_ROW | dict(iterations=100, batch_real=64, matches=10, net_epochs=20)
PAPER = dict(  # supplement Tab. 7 and Sec. 4.1
    objective="mtt", hallucinators=5, depth=1, channels=None, basis_channels=None, basis_size=None, dsa=True,
    class_hallucinators=False, share_conv=False, weight_dd=1., weight_cos=0.1, weight_con=0.1, weight_task=1.,
    lr_adversary=0.001)


class Hallucinators(nn.Module):
    """|H| hallucinators side by side: enc -> scale and shift -> dec (Eq. 2), each with parameters of its own.

    shape (c, h, w) of an image, basis_shape (c', h', w') of a basis: a smaller one is enlarged bilinearly first. depth:
    conv-ReLU blocks in enc, mirrored in dec, whose last block has no ReLU since preprocessed images are signed. channels
    c'': of the first block (None: c at depth 1, 8 beyond). Between blocks the width doubles and the side halves: then
    depth 0 to 3 have the 6,144, 6,312, 10,963 and 16,131 parameters of supplement Tab. 3. The paper does not say how it
    halves and doubles the side: average pooling and nearest neighbours here. (The authors' code has no ReLU and no
    padding; the paper's counts are those with padding.) classes: if not 1, each class has `count` of its own (Tab. 5).
    share: one enc and dec for all (supplement Tab. 5). count 0: a basis, enlarged, is the image: the baselines."""

    def __init__(self, count, shape, basis_shape, channels=None, depth=1, classes=1, share=False):
        super().__init__()
        first = channels or (shape[0] if depth < 2 else 8)
        if depth == 0 and not basis_shape[0] == first == shape[0]:
            raise common.UserError("--depth 0 has no convolutions: leave out --channels and --basis-channels")
        if any(side % 2 ** max(depth - 1, 0) for side in shape[1:]):
            raise common.UserError(f"--depth {depth} halves the side {depth - 1} times, which {shape[1]} pixels do not "
                                   "allow: take a smaller --depth")
        if count == 0 and basis_shape[0] not in (1, shape[0]):
            raise common.UserError("--hallucinators 0 makes an image of 1 or all channels: leave out --basis-channels")
        widths = [first * 2 ** i for i in range(depth)]                               # 3, or 8 -> 16 -> 32
        h, w = (side // 2 ** max(depth - 1, 0) for side in shape[1:])                 # h'', w''
        self.shape, self.classes, inside = tuple(shape), classes, widths[-1] if depth else first
        count *= classes  # number j of class k lies at j * classes + k
        convolutions = min(count, 1) if share else count
        self.encoder = self.conv_blocks(convolutions, [basis_shape[0]] + widths)
        self.scale = nn.Parameter(torch.ones(count, inside, h, w))                    # sigma
        self.shift = nn.Parameter(torch.zeros(count, inside, h, w))                   # mu
        self.decoder = self.conv_blocks(convolutions, widths[::-1] + [shape[0]] * bool(depth))

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

    def forward(self, bases, which, labels=None):
        """bases (B, c', h', w'), which: hallucinators' numbers, a list of J -> images (J, B, c, h, w), preprocessed;
        (1, B, c, h, w) without hallucinators. labels (B,): read where each class has its own. Hallucinators are the
        groups of one grouped convolution, and so are bases, where each needs its own: no loop over them or images."""
        own, groups = self.classes > 1, len(which) * (len(bases) if self.classes > 1 else 1)

        def pick(parameter):  # a list as an index would be copied to the GPU, which waits for it
            numbers = [j * self.classes + labels if own else j for j in which]
            found = torch.cat([parameter[j % len(parameter)] for j in numbers])       # one that is shared is number 0
            return found.flatten(0, 1) if own else found

        def convolve(x, block):
            return F.conv2d(x, pick(block["weight"]), pick(block["bias"]), padding=1, groups=groups)

        if bases.shape[2:] != self.shape[1:]:
            bases = F.interpolate(bases, self.shape[1:], mode="bilinear")
        if not len(self.scale):
            return bases.expand(-1, self.shape[0], -1, -1)[None]
        x = (bases.flatten(0, 1)[None] if own else bases).repeat(1, len(which), 1, 1)  # (B, J * c', h, w)
        for i, block in enumerate(self.encoder):                                      # f = enc(x)           Eq. (2)
            x = F.relu(convolve(F.avg_pool2d(x, 2) if i else x, block))
        x = pick(self.scale) * x + pick(self.shift)                                   # f~ = sigma * f + mu  Eq. (2)
        for i, block in enumerate(self.decoder):                                      # x~ = dec(f~)         Eq. (2)
            x = convolve(F.interpolate(F.relu(x), scale_factor=2) if i else x, block)
        return x.view(len(which), len(bases), *self.shape) if own else x.unflatten(1, (len(which), -1)).transpose(0, 1)


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


def gradient_distance(ours, theirs):
    """D of survey Eq. (22) for two lists of gradients, one (out, ...) a layer -> 0-d. As in the authors' code biases and
    norms, (out,), do not count, and 1e-6 is added to the norms' product: a dead channel's is 0."""
    total = 0
    for a, b in zip(ours, theirs):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)  # A_i, B_i
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()  # Eq. (23)
    return total


def match_gradients(net, theta, real, images, classes, augment=lambda x, c: x):
    """Compare the gradients that each class gives a network (DC, survey Eq. 24), and differentiate.

    theta (P,): net's parameters. real (C * R, c, h, w), images (C * n, c, h, w), both in class order; the graph that
    images hang on is left alone. augment(x, c): DSA for those of class c, the same for both.
    -> (distance D of every class (C,), gradient of its sum with respect to `images`). Classes go one after another:
    no more than one's graph is held at a time."""
    def gradients(x, c, create_graph=False):
        labels = torch.full((len(x),), c, device=x.device)
        return common.unflatten(net, common.student_gradient(net, theta, augment(x, c), labels, create_graph)).values()

    distances, found = [], []
    for c, (theirs, ours) in enumerate(zip(real.chunk(classes), images.detach().chunk(classes))):
        ours = ours.detach().requires_grad_()
        with common.autocast(images.device):
            theirs = list(gradients(theirs, c))
        distance = gradient_distance(gradients(ours, c, create_graph=True), theirs)
        distances.append(distance.detach())
        found += torch.autograd.grad(distance, ours)
    return torch.stack(distances), torch.cat(found)


def distill(data, bpc, settings, seed, experts, checkpoint):
    """Factorise `data` into bpc bases a class and hallucinators (supplement Alg. 1) -> (tensors to store, step size,
    seconds of work). experts, checkpoint: as in common.load_experts and common.iterations; with dm and dc experts and
    step size are None. Raises common.UserError."""
    device, classes, count = data.device, len(data.classes), settings["hallucinators"]
    c, h, w = data.shape
    basis_shape = (settings["basis_channels"] or c, settings["basis_size"] or h, settings["basis_size"] or w)

    # line 1: bases start from real images, hallucinators and F at random
    bases, labels = data.random_real(bpc, seed, "bases")
    if basis_shape[0] != c:  # one channel: the mean over the colours
        bases = bases.mean(1, keepdim=True).repeat(1, basis_shape[0], 1, 1)
    if basis_shape[1:] != (h, w):
        bases = F.interpolate(bases, basis_shape[1:], mode="bilinear", antialias=True)
    bases, learn_labels = bases.requires_grad_(), settings.get("learn_labels", False)
    soft_labels = F.one_hot(labels, classes).float().requires_grad_() if learn_labels else labels
    hallucinators = common.seeded((seed, "hallucinators"), Hallucinators, count, data.shape, basis_shape,
                                  settings["channels"], settings["depth"],
                                  classes if settings["class_hallucinators"] else 1, settings["share_conv"]).to(device)
    adversary = common.seeded((seed, "F"), common.ConvNet, data.shape, classes).to(device)

    own_bases = [bases] + [soft_labels] * learn_labels
    factors = own_bases + [p for p in hallucinators.parameters() if len(p)]
    of_factors = torch.optim.SGD([{"params": own_bases, "lr": settings["lr_bases"]},
                                  {"params": hallucinators.parameters(), "lr": settings["lr_hallucinators"]}],
                                 momentum=settings["momentum"])
    of_adversary = torch.optim.SGD(adversary.parameters(), lr=settings["lr_adversary"], momentum=0.9)  # eta_F
    state = {"bases": bases, "soft_labels": soft_labels, "hallucinators": hallucinators, "adversary": adversary,
             "of_factors": of_factors, "of_adversary": of_adversary}
    net = common.ConvNet(data.shape, classes).to(device).requires_grad_(False)  # what L_DD is measured with
    if settings["objective"] == "mtt":
        step_size = torch.tensor(settings["step_size"], device=device, requires_grad=True)
        of_step = torch.optim.SGD([step_size], lr=settings["lr_step"], momentum=0.9)  # momentum: the authors' code
        state |= {"step_size": step_size, "of_step": of_step}
    else:
        state["theta"] = theta = common.flat_parameters(net)  # net's parameters and, for DC, their momentum
        state["velocity"] = velocity = torch.zeros_like(theta)
        members, smallest = common.class_members(data)
    watch = {"loss": torch.zeros(())}

    same = common.identity(METHOD, data, bpc, settings, seed, experts)
    for it in common.iterations(settings["iterations"], checkpoint, same, state, watch):      # line 2
        # Lines 3 to 9. Alg. 1 pairs every basis of a batch with every hallucinator of a batch; the experiments send
        # each student step's batch through one hallucinator, drawn anew, and through DSA. Two hallucinators in one
        # iteration (Sec. 4.1) are for L_cos, F, DM and DC. What was not drawn moves on by its momentum alone.
        def batch(n):
            index = common.student_batch(len(bases), settings["batch"], n, seed, it, device=device)
            j = common.hash_int((seed, "hallucinator", it, n)) % max(count, 1)
            return augment(hallucinators(bases[index], [j], labels[index])[0], len(index), n), soft_labels[index]

        def augment(images, draws, *key):  # one draw for all images: the Siamese form
            draw = common.draw_dsa(draws, seed, it, *key, device=device, flip=data.flip)
            return common.dsa(images, *draw) if settings["dsa"] else images

        # line 10: L_S = lambda_DD L_DD + lambda_cos L_cos, Eq. (6)
        of_factors.zero_grad()
        pair = draw_pair(count, seed, "pair", it) if count else []
        if settings["objective"] == "mtt":  # L_DD is Eq. (7)
            start, target = common.draw_start(experts, settings, seed, it)
            watch["loss"], step_size.grad = common.match_trajectory(net, start, target, step_size, batch,
                                                                    settings["student_steps"], settings["compile"])
            step_size.grad.mul_(settings["weight_dd"])
            of_step.step()
            with torch.no_grad():
                step_size.clamp_(min=0.001)
        else:
            if it % settings["matches"] == 0:
                theta.copy_(common.flat_parameters(common.start_anew(net, seed, "network", it)))
                velocity.zero_()
            index = common.draw_members(members, min(settings["batch_real"], smallest), seed, "real", it)
            images = hallucinators(bases, pair, labels).transpose(0, 1).flatten(0, 1)  # class by class
            if settings["objective"] == "dm":  # L_DD is survey Eq. (31)
                images = augment(images, 1, "match")
                real, real_labels = augment(data.train[index], 1, "match"), data.train_labels[index]
                means = common.mean_features(net, real, real_labels, classes)
                distance, gradient = common.match_means(net, means, images)
            else:  # L_DD is survey Eq. (24), with a transform for each class, as in the authors' code
                distance, gradient = match_gradients(net, theta, data.train[index], images, classes,
                                                            lambda x, c: augment(x, 1, "match", c))
            images.backward(gradient)
            watch["loss"] = distance.sum()
        for leaf in factors:
            leaf.grad.mul_(settings["weight_dd"])
        chosen = common.student_batch(len(bases), settings["batch"], 0, seed, it, "cosine", device=device)
        if len(pair) == 2 and settings["weight_cos"]:
            images = hallucinators(bases[chosen], pair, labels[chosen])
            features = adversary.features(images.flatten(0, 1)).unflatten(0, (2, -1))
            (settings["weight_cos"] * cosine_loss(features)).backward()
        of_factors.step()                                                             # lines 11 and 12
        if settings["objective"] == "dc" and (it + 1) % settings["matches"]:
            for n in range(settings["net_epochs"] * -(-len(bases) // settings["batch"])):
                with torch.no_grad():
                    images, of_images = batch(n)
                with common.autocast(device):
                    gradient = common.student_gradient(net, theta, images, of_images)
                theta -= settings["lr_net"] * velocity.mul_(settings["momentum_net"]).add_(gradient)   # survey Eq. (20)

        # lines 13 and 14: F learns the classes and to see one basis in its two hallucinations, Eq. (4). (The authors
        # add 0.1 (1 - cos) / 2 to it; the paper does not.) The images are composed anew: their factors have moved.
        if len(pair) < 2 or not settings["weight_cos"]:
            continue  # nothing that F is for
        with torch.no_grad():
            images = hallucinators(bases[chosen], pair, labels[chosen])
        features = adversary.features(images.flatten(0, 1))
        of_adversary.zero_grad()
        loss_f = settings["weight_task"] * F.cross_entropy(adversary.classifier(features),
                                                           labels[chosen].repeat(len(pair)))
        loss_f = loss_f + settings["weight_con"] * contrastive_loss(features.unflatten(0, (len(pair), -1)), labels[chosen])
        loss_f.backward()
        of_adversary.step()

    tensors = {"bases": bases, "labels": soft_labels} | {f"hallucinators.{name}": p for name, p in
                                                         hallucinators.named_parameters()}
    step_size = step_size.item() if settings["objective"] == "mtt" else None
    return {name: tensor.detach() for name, tensor in tensors.items()}, step_size, watch["seconds"]


def protocol_of(settings):
    """How a file is scored: without DSA where it was distilled without (Tab. 6)."""
    return common.PROTOCOL | ({} if settings["dsa"] else {"augment": ()})


def distill_to_file(path, data, bpc, settings, seed, data_dir):
    """The whole run: experts (under data_dir; MTT's objective alone), distillation (its checkpoint beside `path`),
    distilled file `path` -> what the file holds. Raises common.UserError."""
    experts = common.experts_for(data, data_dir, settings, bpc, seed) if settings["objective"] == "mtt" else None
    tensors, step_size, seconds = distill(data, bpc, settings, seed, experts, path.with_suffix(".ckpt"))
    return common.save_distilled(path, data, METHOD, bpc, tensors, step_size, settings, seconds, seed,
                                 protocol_of(settings))


def draw_pair(count, *key):
    """Two different hallucinators ("random 2 hallucinators in one iteration", Sec. 4.1), or the only one."""
    first, skip = common.hash_int((*key, "first")) % count, common.hash_int((*key, "skip")) % max(count - 1, 1)
    return [first, (first + 1 + skip) % count][:count]


def hallucinate(distilled, device="cpu"):
    """All images of a distilled file -> (|H|, |B|, c, h, w) preprocessed, labels (|B|,) or soft (|B|, C)."""
    weights = {name.removeprefix("hallucinators."): tensor for name, tensor in distilled.items()
               if name.startswith("hallucinators.")}
    bases, count = distilled["bases"].to(device), distilled["settings"]["hallucinators"]
    classes = len(weights["scale"]) // count if count else 1  # that have hallucinators of their own
    depth = sum(name.startswith("encoder.") for name in weights) // 2
    channels = weights["encoder.0.bias"].shape[1] if depth else None
    hallucinators = Hallucinators(count, distilled["shape"], bases.shape[1:], channels, depth, classes,
                                  distilled["settings"].get("share_conv")).to(device)
    hallucinators.load_state_dict(weights)
    labels = torch.arange(classes, device=device).repeat_interleave(len(bases) // classes)
    with torch.no_grad():
        return hallucinators(bases, list(range(count)), labels), distilled["labels"].to(device)


def sampler(distilled, device, pairs=False):
    """What common.score draws batches from: (draw(run, index, *key) -> images, labels; number of entries). Each basis
    drawn goes through one hallucinator drawn at random (pairs: then all go once more, through another one each): an
    epoch is as long as the number of bases."""
    images, labels = hallucinate(distilled, device)

    def draw(run, index, *key):
        generator = common.rng(*key, "which", device=device)
        which = torch.randint(len(images), (len(index),), generator=generator, device=device)
        if pairs:
            skip = torch.randint(1, len(images), which.shape, generator=generator, device=device)
            which, index = torch.cat([which, (which + skip) % len(images)]), index.repeat(2)
        return images[which, index], labels[index]

    return draw, images.shape[1]


def accumulate_contrast(weight, net, parameters, images, labels, criterion):
    """In place of common.accumulate_gradient: weight * L_con, Eq. (3), joins the loss of downstream training (Tab. 4,
    last row). images (R, 2 b, c, h, w): a batch of the sampler's pairs for each of R networks."""
    for r, (x, y) in enumerate(zip(images, labels)):
        features = []
        with net.classifier.register_forward_pre_hook(lambda _, x: features.extend(x)), common.autocast(x.device):
            logits = torch.func.functional_call(net, {name: p[r] for name, p in parameters.items()}, x).float()
        contrast = contrastive_loss(features[0].float().unflatten(0, (2, -1)), y.chunk(2)[0])
        (criterion(logits, y) + weight * contrast).backward()


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


def variant(settings):
    """What the results call a file: its objective and what differs from the paper's main experiment, e.g. "mtt",
    "dm weight_cos=0.0"."""
    return " ".join([settings["objective"], *(f"{name}={settings[name]}" for name, value in PAPER.items()
                                              if name != "objective" and settings.get(name, value) != value)])


def main():
    parser = argparse.ArgumentParser(description="Distil a data set into bases and hallucinators (HaBa).",
                                     formatter_class=common.HelpFormatter)
    common.add_arguments(parser, "bpc", "bases a class, |B| / C")
    add = parser.add_argument
    add("--objective", choices=("mtt", "dm", "dc"), default="mtt", help="L_DD: MTT's, DM's or DC's, Tab. 2 (mtt)")
    common.add_trajectory_arguments(parser, "15000; dm 20000; dc 1000 to 50000")
    add("--batch-real", type=common.positive, help="dm, dc: real images a class in an iteration (256)")
    add("--hallucinators", type=int, help="|H|: number of hallucinators (5); 0: bases are images, as without HaBa")
    add("--class-hallucinators", action="store_true", default=None, help="|H| for each class, Tab. 5 (for all)")
    add("--share-conv", action="store_true", default=None, help="all share enc and dec, supplement Tab. 5 (off)")
    add("--depth", type=int, choices=range(6), help="conv-ReLU blocks in enc and in dec (1)")
    add("--channels", type=common.positive, help="c'': channels inside a hallucinator (as an image; from --depth 2 on 8)")
    add("--basis-channels", type=common.positive, metavar="N", help="c': channels of a basis (as an image)")
    add("--basis-size", type=common.positive, help="h' = w': side of a basis (as an image)")
    add("--lr-bases", type=common.amount, help="eta_B: learning rate of the bases (100; dm 1; dc .1)")
    add("--lr-hallucinators", type=common.amount, metavar="LR", help="eta_H: of the hallucinators (100; dm, dc .001)")
    add("--weight-dd", type=common.amount, help="lambda_DD: weight of the objective, Eq. 6 (1)")
    add("--weight-cos", type=common.amount, help="lambda_cos: weight of the cosine term, Eq. 6 (0.1)")
    add("--weight-con", type=common.amount, help="lambda_con: weight of the contrastive loss of F, Eq. 4 (0.1)")
    add("--weight-task", type=common.amount, help="lambda_task: weight of cross-entropy of F, Eq. 4 (1)")
    add("--learn-labels", action="store_true", default=None, help="learn y^ as well: Alg. 1, line 12, optional (off)")
    add("--no-dsa", dest="dsa", action="store_false", default=None, help="no DSA on hallucinated images, Tab. 6")
    add("--con-downstream", action="store_true", help="score with L_con in the training, Tab. 4; the file is the same")
    args = parser.parse_args()
    table = {"mtt": SETTINGS, "dm": DM_SETTINGS, "dc": DC_SETTINGS}[args.objective]
    settings = common.merge_settings(PAPER | common.settings_for(table, args.dataset, args.bpc), args)
    for name in {*ROW, *DM_ROW} - {*settings}:
        if vars(args).get(name) is not None:
            raise common.UserError(f"--{name.replace('_', '-')} is not for --objective {args.objective}: leave it out")
    if settings["hallucinators"] < 2 * args.con_downstream or args.con_downstream and args.learn_labels:
        raise common.UserError("take --hallucinators 0 or more; with --con-downstream 2 or more and no --learn-labels")

    stem = METHOD if args.objective == "mtt" else f"{METHOD}_{args.objective}"
    path = common.output_path(stem, args, f"bpc{args.bpc}")
    data = common.load_dataset(args.dataset, args.data_dir, settings["zca"], args.size, common.pick_device(args.device))
    distilled = distill_to_file(path, data, args.bpc, settings, args.seed, args.data_dir)
    picture(path.with_suffix(".png"), data, distilled)
    print(f"wrote {path} and {path.with_suffix('.png')}")
    protocol = protocol_of(settings)
    if args.con_downstream:
        protocol["accumulate"] = lambda *batch: accumulate_contrast(settings["weight_con"], *batch)
    name = variant(settings) + " con-downstream" * args.con_downstream
    common.score(data, distilled, *sampler(distilled, data.device, args.con_downstream), args.out, args.epochs,
                 args.runs, args.seed, protocol, more={"variant": name})


if __name__ == "__main__":
    common.run(main)
