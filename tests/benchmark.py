"""How long one iteration of each method takes, beside the plain way of doing it and beside the arithmetic floor.

    python tests/benchmark.py                       # the table; on a CPU about twenty minutes
    python tests/benchmark.py --growth              # time and memory over images a class and student steps
    python tests/benchmark.py --only dm mtt         # some rows

Images are noise in CIFAR-10's shape: no download, and the time does not depend on them. Each measurement runs in a
process of its own, whose peak memory (resident on a CPU, allocated on a GPU) stands beside it. The plain way is what a
first version of each method does: one class, decoder or network after another, the whole graph kept, float32, no chunks.
The floor: multiplications and additions of all convolutions and matrix products of one iteration, as ours does it,
divided by the rate that this machine reaches in a large matrix product of the same type (times 2048^3). Nothing here
runs in the test run."""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common, dm, frepo, haba, kfs, mtt, translator_fewshot  # noqa: E401,E402
from plain import peak_memory, plain_match  # noqa: E402

SHAPE, CLASSES, SEED = (3, 32, 32), 10, 0
FOLDER = tempfile.TemporaryDirectory(prefix="benchmark_")


def noise(count, device):
    """A common.Dataset of `count` training images of noise in CIFAR-10's shape, the classes of equal size."""
    g = torch.Generator().manual_seed(SEED)
    images, labels = torch.randn(count, *SHAPE, generator=g), torch.arange(count) % CLASSES
    mean = torch.zeros(3, 1, 1, device=device)
    return common.Dataset("noise", [str(c) for c in range(CLASSES)], images.to(device), labels.to(device),
                          images[:2000].to(device), labels[:2000].to(device),
                          common.Preprocess("standardise", "noise", mean, mean + 1))


def fake_experts(settings, device):
    """Two experts that move as far in an epoch as real ones do, roughly."""
    net = common.seeded(("experts",), common.ConvNet, SHAPE, CLASSES)
    start, epochs = common.flat_parameters(net), settings["max_start"] + settings["expert_epochs"] + 1
    walk = .01 * torch.randn(2, epochs, len(start), generator=torch.Generator().manual_seed(1)).cumsum(1)
    return (start + walk).to(device)


def fresh_checkpoint():
    """A path where nothing lies yet; the folder goes with the process."""
    return pathlib.Path(tempfile.mkdtemp(dir=FOLDER.name)) / "checkpoint"


def train_plainly(images, labels, epochs, **of_sgd):
    """A ConvNet trained on images for some epochs, in float32, a batch at a time -> the network."""
    net = common.ConvNet(SHAPE, CLASSES).to(images.device)
    sgd = torch.optim.SGD(net.parameters(), **of_sgd)
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(images)).to(images.device).split(256)):
            x = common.dsa(images[index], *common.draw_dsa(len(index), epoch, step, device=images.device))
            loss = F.cross_entropy(net(x), labels[index])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    return net


def siamese_means(net, images, draw):
    return net.features(common.dsa(images, *draw)).mean(0)


# ------------------------------------------------------------------------------------------ one row of the table each
#
# row(device, per_class, steps) -> (ours(n), plain(n), images): n iterations our way and the plain way, and how many
# images (real and synthetic, each time one goes through a network) there are in an iteration.

def row_expert(device, per_class, steps):
    """An expert's epoch, of 5,120 images: a tenth of CIFAR-10's."""
    data = noise(5120, device)

    def ours(n):
        net = common.ConvNet(SHAPE, CLASSES).to(device)
        for _ in common.expert_epochs(data, net, None, n, ("benchmark",)):
            pass

    def plain(n):
        train_plainly(data.train, data.train_labels, n, lr=.01)

    return ours, plain, len(data.train)


def row_evaluation(device, per_class, steps):
    """Ten epochs of the training of five networks on `per_class` images a class, and their test on 2,000 images."""
    data = noise(2000, device)
    images, labels = data.random_real(per_class, SEED, "images")

    def ours(n):
        common.train_and_test(data, lambda run, index, *key: (images[index], labels[index]), len(images), epochs=10 * n)

    def plain(n):
        for _ in range(5):
            net = train_plainly(images, labels, 10 * n, lr=.01, momentum=.9, weight_decay=5e-4)
            with torch.no_grad():
                torch.cat([net(x) for x in data.test.split(256)]).argmax(1).eq(data.test_labels).float().mean().item()

    return ours, plain, 5 * 10 * len(images)


def row_dm(device, per_class, steps):
    """DM: 256 real images a class."""
    data, settings = noise(5120, device), dict(dm.SETTINGS["cifar10", 1])

    def ours(n):
        dm.distill(data, per_class, settings | {"iterations": n}, SEED, fresh_checkpoint())

    def plain(n):  # one class after another
        images, _ = data.random_real(per_class, SEED, "images")
        images.requires_grad_()
        sgd = torch.optim.SGD([images], lr=1., momentum=.5)
        for it in range(n):
            net, loss = common.ConvNet(SHAPE, CLASSES).to(device).requires_grad_(False), 0
            for c in range(CLASSES):
                real = data.train[data.train_labels == c]
                real = real[torch.randperm(len(real)).to(device)[:256]]
                draw = common.draw_dsa(1, it, device=device)
                gap = siamese_means(net, real, draw).detach() - siamese_means(
                    net, images[c * per_class:(c + 1) * per_class], draw)
                loss = loss + gap.square().sum()
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    return ours, plain, CLASSES * (256 + per_class)


def row_mtt(device, per_class, steps):
    """MTT: an iteration of `steps` student steps."""
    data = noise(1000, device)
    settings = mtt.PAPER | mtt.SETTINGS["cifar10", 10] | {"student_steps": steps}
    experts = fake_experts(settings, device)

    def ours(n):
        mtt.distill(data, per_class, settings | {"iterations": n}, SEED, experts, fresh_checkpoint())

    def plain(n):  # the whole graph kept
        net = common.ConvNet(SHAPE, CLASSES).to(device)
        images, labels = data.random_real(per_class, SEED, "images")
        images.requires_grad_()
        step_size = torch.tensor(.01, device=device, requires_grad=True)
        sgd = torch.optim.SGD([images], lr=100., momentum=.5)
        for it in range(n):
            start, target = common.draw_start(experts, settings, it)
            sgd.zero_grad()
            plain_match(net, start, target, step_size, lambda s: (common.dsa(
                images, *common.draw_dsa(len(images), it, s, device=device)), labels), steps)
            sgd.step()

    return ours, plain, CLASSES * per_class * steps


def row_compiled(device, per_class, steps):
    """MTT with --compile: an iteration of `steps` student steps."""
    data, net = noise(1000, device), common.ConvNet(SHAPE, CLASSES).to(device).requires_grad_(False)
    images, labels = data.random_real(per_class, SEED, "images")
    images.requires_grad_()
    start, step_size = common.flat_parameters(net), torch.tensor(.01, device=device)

    def ours(n, compiled=True):  # one network: mtt.distill has a new one in every run, which compiles anew
        for it in range(n):
            images.grad = None
            common.match_trajectory(net, start, start + .01, step_size, lambda s: (common.dsa(
                images, *common.draw_dsa(len(images), it, s, device=device)), labels), steps, compiled)

    return ours, row_mtt(device, per_class, steps)[1], CLASSES * per_class * steps


def row_haba(device, per_class, steps):
    """HaBa: an iteration of `steps` student steps, five hallucinators, cosine term and adversary."""
    data = noise(1000, device)
    settings = haba.PAPER | haba.SETTINGS["cifar10", 10] | {"student_steps": steps}
    experts = fake_experts(settings, device)

    def ours(n):
        haba.distill(data, per_class, settings | {"iterations": n}, SEED, experts, fresh_checkpoint())

    def plain(n):  # the whole graph kept, through the hallucinators too; one image and hallucinator after another
        net = common.ConvNet(SHAPE, CLASSES).to(device)
        adversary = common.ConvNet(SHAPE, CLASSES).to(device)
        bases, labels = data.random_real(per_class, SEED, "bases")
        bases.requires_grad_()
        hallucinators = [haba.Hallucinators(1, SHAPE, SHAPE).to(device) for _ in range(5)]
        step_size = torch.tensor(.01, device=device, requires_grad=True)
        sgd = torch.optim.SGD([bases, *(p for h in hallucinators for p in h.parameters())], lr=1., momentum=.95)
        of_adversary = torch.optim.SGD(adversary.parameters(), lr=.001, momentum=.9)

        def compose(j):
            return torch.cat([hallucinators[j](basis[None], [0])[0] for basis in bases])

        for it in range(n):
            start, target = common.draw_start(experts, settings, it)
            sgd.zero_grad()
            plain_match(net, start, target, step_size, lambda s: (common.dsa(
                compose(s % 5), *common.draw_dsa(len(bases), it, s, device=device)), labels), steps)
            pair = [compose(0), compose(1)]
            (.1 * haba.cosine_loss(torch.stack([adversary.features(x) for x in pair]))).backward()
            sgd.step()
            of_adversary.zero_grad()
            features = torch.stack([adversary.features(x.detach()) for x in pair])
            loss = sum(F.cross_entropy(adversary.classifier(f), labels) for f in features) / 2
            (loss + .1 * haba.contrastive_loss(features, labels)).backward()
            of_adversary.step()

    return ours, plain, CLASSES * per_class * (steps + 4)


def row_kfs(device, per_class, steps):
    """KFS with stored real means (an iteration without them adds the features of all real images)."""
    data = noise(4000, device)
    settings = kfs.settings_of("cifar10", SHAPE, per_class) | {"pretrain": 1, "real_means": 2}
    draws = [common.flat_parameters(common.ConvNet(SHAPE, CLASSES)).to(device) for _ in range(2)]
    means = torch.randn(2, CLASSES, 2048, generator=torch.Generator().manual_seed(1)).to(device)
    real_means = (torch.stack(draws), means, (None, None))

    def ours(n):
        kfs.distill(data, per_class, settings | {"iterations": n}, SEED, fresh_checkpoint(), real_means)

    def plain(n):  # one decoder and class after another, the whole graph kept
        codes, decoders = kfs.pretrain(data, settings, SEED)
        codes.requires_grad_()
        adam = torch.optim.Adam([codes, *decoders.parameters()], lr=.01)
        net = common.ConvNet(SHAPE, CLASSES).to(device).requires_grad_(False)
        for it in range(n):
            torch.nn.utils.vector_to_parameters(draws[it % 2], net.parameters())
            loss = 0
            for c in range(CLASSES):
                ours = [net.features(decoders(codes[c], torch.tensor([d], device=device)).flatten(0, 1))
                        for d in range(settings["decoders"])]
                loss = loss + (means[it % 2, c] - torch.cat(ours).mean(0)).square().sum() / 2 / CLASSES
            adam.zero_grad()
            loss.backward()
            adam.step()

    return ours, plain, CLASSES * settings["codes"] * settings["decoders"]


def row_frepo(device, per_class, steps):
    """FRePo: 1,024 real images, a pool of ten networks."""
    data, settings = noise(5120, device), dict(frepo.ROW)

    def ours(n):
        frepo.distill(data, per_class, settings | {"iterations": n}, SEED, fresh_checkpoint())

    def plain(n):  # a graph through the real images as well, the inverse written out
        images, numbers = data.random_real(per_class, SEED, "images")
        labels = common.centre_labels(numbers, CLASSES)
        lamb = frepo.Lamb([images.requires_grad_(), labels.requires_grad_()], 3e-4)
        pool = [common.FRePoNet(SHAPE, CLASSES, norm=True).to(device) for _ in range(10)]
        adams = [torch.optim.Adam(net.parameters(), lr=3e-4) for net in pool]
        for it in range(n):
            net, adam = pool[it % 10], adams[it % 10]
            some = torch.randperm(len(data.train)).to(device)[:1024]
            support = net.features(torch.cat([images, images.flip(3)])).double()
            kernel = support @ support.T
            kernel = kernel + 1e-6 * kernel.trace() / len(kernel) * torch.eye(len(kernel), device=device)
            predicted = net.features(data.train[some]).double() @ support.T @ kernel.inverse() @ torch.cat([labels] * 2).double()
            lamb.zero_grad()
            (common.squared_error(predicted, common.targets(data.train_labels[some], CLASSES)) / 1024
             + frepo.margin_loss(labels)).backward()
            lamb.step()
            adam.zero_grad()
            (common.squared_error(net(images.detach()), labels.detach()) / len(images)).backward()
            adam.step()

    return ours, plain, 1024 + 3 * CLASSES * per_class


def row_translator(device, per_class, steps):
    """Translator: a step of the distillation in one network, against 5,120 real images."""
    data, settings = noise(5120, device), dict(translator_fewshot.PAPER)
    net = translator_fewshot.one_network(data)
    real_labels = common.targets(data.train_labels, CLASSES)

    def ours(n):
        real_features = common.features(net, data.train)
        images, labels = translator_fewshot.start_synthetic(data, per_class, settings, SEED, "images")
        translator_fewshot.distil_in_one_network(net, images, labels, real_features, real_labels,
                                                 settings | {"steps": n}, SHAPE[-1], (SEED,))

    def plain(n):  # the real images' features computed again in every step
        images, labels = translator_fewshot.start_synthetic(data, per_class, settings, SEED, "images")
        adam = torch.optim.Adam([images.requires_grad_(), labels.requires_grad_()], lr=.001)
        for it in range(n):
            with torch.no_grad():
                real_features = torch.cat([net.features(x) for x in data.train.split(256)])
            loss = common.nfr_loss(net.features(images), labels, real_features, real_labels)
            adam.zero_grad()
            loss.backward()
            adam.step()

    return ours, plain, CLASSES * per_class


ROWS = {name.removeprefix("row_"): row for name, row in list(globals().items()) if name.startswith("row_")}


# ------------------------------------------------------------------------------------------ measuring

class Counter(TorchDispatchMode):
    """Floating-point operations of all convolutions and matrix products that run inside, by type, as torch's own
    counter takes them from the layers' shapes."""

    def __init__(self):
        super().__init__()
        self.total = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if function._overloadpacket in flop_registry:
            first = next(t for t in (found if isinstance(found, (tuple, list)) else [found]) if torch.is_tensor(t))
            count = flop_registry[function._overloadpacket](*args, **kwargs or {}, out_val=found)
            self.total[str(first.dtype)] = self.total.get(str(first.dtype), 0) + count
        return found


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def rates(device):
    """Operations a second in a matrix product of 2048 x 2048 numbers of each type, the best of ten."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        a, best = torch.randn(2048, 2048, device=device).to(dtype), math.inf
        for _ in range(10):
            began = time.time()
            a @ a
            wait(device)
            best = min(best, time.time() - began)
        found[str(dtype)] = 2 * 2048 ** 3 / best
    return found


def measure(row, way, device, per_class, steps, budget):
    """-> dict(seconds: of one iteration, peak_mb, images, floor: seconds)."""
    device = common.pick_device(device)
    ours, plain, images = ROWS[row](device, per_class, steps)
    run = {"ours": ours, "plain": plain}[way]

    def clock(n):
        began = time.time()
        run(n)
        wait(device)
        return time.time() - began

    clock(1)  # warm
    first = clock(1)
    n = max(1, min(40, int(budget / first)))
    # What begins and ends a run (random images, a checkpoint) is the same for 1 and for n + 1 iterations: it cancels out.
    seconds = min((clock(1 + n) - min(first, clock(1))) / n for _ in range(2))
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else peak_memory()
    floor = None
    if way == "ours":
        counts = []
        for k in (1, 2):
            with Counter() as counter:  # counts operations one by one: not what is compiled
                run(k, **{"compiled": False} if row == "compiled" else {})
            counts.append(counter.total)
        rate = rates(device)
        floor = sum((total - counts[0].get(kind, 0)) / rate[kind] for kind, total in counts[1].items())
    return {"seconds": seconds, "peak_mb": round(peak), "images": images, "floor": floor}


def in_a_process(*args):
    """measure(...) in a process of its own -> its dict, or None where memory was short."""
    done = subprocess.run([sys.executable, __file__, "--measure", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(map(str, args))}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def show(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def table(rows, args):
    """The Markdown table of ours, plain and floor."""
    print("| one iteration | ours | images/s | memory | the plain way | memory | times faster | floor | ours / floor |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        ours, plain = (in_a_process(row, way, args.device, args.per_class, args.steps, args.budget)
                       for way in ("ours", "plain"))
        if not ours:
            continue
        right = f"{show(plain['seconds'])} | {plain['peak_mb']:,} MB | {plain['seconds'] / ours['seconds']:.2f}" if plain \
            else "out of memory | |"
        what = ROWS[row].__doc__.rstrip(".").replace("`per_class`", str(args.per_class)).replace("`steps`", str(args.steps))
        print(f"| {what} | {show(ours['seconds'])} | {ours['images'] / ours['seconds']:,.0f} | {ours['peak_mb']:,} MB | "
              f"{right} | {show(ours['floor'])} | {ours['seconds'] / ours['floor']:.1f} |", flush=True)


def growth(rows, args):
    """Time and memory of our way over images a class and student steps, with the exponent between the ends."""
    print("| one iteration | over | time | exponent | memory |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        plans = [("images a class", (1, 10, 50), lambda x: (x, 10))]
        plans += [("student steps", (10, 20, 40), lambda x: (1, x))] * (row in ("mtt", "compiled", "haba"))
        for what, values, place in plans * (row != "expert"):
            found = [in_a_process(row, "ours", args.device, *place(x), args.budget) for x in values]
            if not all(found):
                continue
            exponent = math.log(found[-1]["seconds"] / found[0]["seconds"]) / math.log(values[-1] / values[0])
            print(f"| {row} | {what} {', '.join(map(str, values))} | {', '.join(show(f['seconds']) for f in found)} | "
                  f"{exponent:.2f} | {', '.join(format(f['peak_mb'], ',') for f in found)} MB |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Time one iteration of each method.")
    add = parser.add_argument
    add("--only", nargs="+", choices=ROWS, default=list(ROWS), help="some rows")
    add("--growth", action="store_true", help="over images a class and student steps")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--per-class", type=int, default=10, help="images, or bases, a class (10)")
    add("--steps", type=int, default=30, help="student steps of MTT and HaBa (30)")
    add("--budget", type=float, default=10., help="seconds to measure for, each (10)")
    add("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        row, way, device, per_class, steps, budget = args.measure
        print(json.dumps(measure(row, way, device, int(per_class), int(steps), float(budget))))
        return
    device = common.pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.per_class} images a class, {args.steps} student steps. Matrix "
          f"products: {', '.join(f'{kind[6:]} {rate / 1e9:,.0f} GFLOP/s' for kind, rate in rates(device).items())}\n")
    (growth if args.growth else table)(args.only, args)


if __name__ == "__main__":
    main()
