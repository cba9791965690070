"""Time of one iteration of each method, beside the arithmetic floor.

    python tests/benchmark.py --quick                 # a few minutes on two cores
    python tests/benchmark.py                         # a quarter of an hour

Images are noise, 3x32x32 in 10 classes. Seconds: the median of the iterations that fit into the
budget, without the first two, which compile. Floor: the arithmetic of the networks, counted by
hand, over the rate of a large matrix product. In forward passes an image costs 1 without a
gradient, 2 with its own, 3 with the network's, 9 in a student step (3 forward and backward, 6 for
the gradient of the gradient; what is built a second time does not count).
"""

import argparse
import pathlib
import sys
import time
from functools import partial

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import dm  # noqa: E402
import frepo  # noqa: E402
import haba  # noqa: E402
import kfs  # noqa: E402
import mtt  # noqa: E402
import translator_fewshot  # noqa: E402

SHAPE, CLASSES = (3, 32, 32), 10
# Operations of a forward pass of an image, in the ConvNet and in FRePo's
CONVNET = 2 * (27 * 128 * 32**2 + 1152 * 128 * (16**2 + 8**2) + 2048 * CLASSES)
FREPO = 2 * (27 * 128 * 32**2 + 1152 * 256 * 16**2 + 2304 * 512 * 8**2 + 8192 * CLASSES)


class Timer:
    """Take the place of common.Run; raise TimeoutError(seconds) when the budget is spent."""

    start, budget = 0, 10.0

    def __init__(self, *_, **__):
        self.record = {}
        self.restore()

    def restore(self, *_):
        self.times, self.last = [], time.perf_counter()

    def step(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.last)
        self.last = time.perf_counter()
        if sum(self.times[2:]) > self.budget:
            times = sorted(self.times[2:])
            raise TimeoutError(times[len(times) // 2])


def repeat(function, *args):
    timer = Timer()
    while True:
        function(*args)
        timer.step()


def measure(work):
    """Run a loop with a Timer -> seconds of an iteration."""
    try:
        work()
    except TimeoutError as end:
        return end.args[0]


def matmul_rate(device, dtype):
    """Operations a second in a product of matrices of side 2048."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as in convolutions
    x = torch.randn(2048, 2048, device=device).to(dtype)
    rate = 2 * 2048**3 / measure(partial(repeat, torch.matmul, x, x))
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate


def make_data(device, count=5120):
    """A Dataset of noise."""
    images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (torch.arange(count) % CLASSES).to(device)
    mean = torch.zeros(3, 1, 1, device=device)
    preprocess = common.Preprocess("standardize", mean, mean + 1)
    arrays = images, labels, images, labels
    return common.Dataset("noise", list("0123456789"), *arrays, preprocess, "noise", "noise")


def distill(module, device, **settings):
    """The loop of a method, without checkpoints."""
    module.distill(make_data(device), module.Args(**settings), pathlib.Path("nowhere.pt"))


def rows(device, quick):
    """Yield name, images, operations in float32 and in common.fast_type, work."""
    data, net = make_data(device, 100), common.ConvNet(SHAPE, CLASSES).to(device)
    score = partial(repeat, common.train_and_test, data, data.train[None], data.train_labels)
    work = partial(score, common.Protocol(), common.Args(epochs=20))
    yield "score of 20 epochs, 100 images", 2100, 0, 6100 * CONVNET, work
    data, optimizer = make_data(device, 2048), torch.optim.SGD(net.parameters(), lr=0.01)
    work = partial(repeat, common.train_epoch, net, optimizer, data, data.train[None])
    work = partial(work, data.train_labels, common.Protocol(), 0)
    yield "expert's epoch, 2,048 images", 2048, 0, 3 * 2048 * CONVNET, work
    for ipc in (10,) if quick else (1, 10, 50):
        n = CLASSES * ipc
        for steps in (10,) if quick else (10, 20, 40):
            work = partial(distill, mtt, device, ipc=ipc, student_steps=steps)
            yield f"MTT, {ipc} a class, {steps} steps", n * steps, 0, 9 * n * steps * CONVNET, work
        work = partial(distill, haba, device, bpc=ipc, student_steps=10)
        yield f"HaBa, {ipc} a class, 10 steps", 14 * n, 10 * n * CONVNET, 90 * n * CONVNET, work
        work, pooled = partial(distill, frepo, device, ipc=ipc), min(n, 500)
        floor = (4 * n + 3 * pooled) * FREPO, 1024 * FREPO
        yield f"FRePo, {ipc} a class, 1,024 real", 1024 + 2 * n + pooled, *floor, work
        m = n * (128 if ipc == 1 else 32)
        work = partial(distill, kfs, device, ipc=ipc, high_res=ipc > 1, pretrain=1, batch_real=256)
        yield f"KFS, {ipc} a class, 256 real", 2560 + m, 0, (2560 + 3 * m) * CONVNET, work
        work = partial(distill, translator_fewshot, device, ipc=ipc, mode="one-net")
        floor = 4 * n * FREPO + 4 * 8192**2 * CLASSES
        yield f"translator's step in one network, {ipc} a class", 2 * n, floor, 0, work
        work = partial(distill, dm, device, ipc=ipc)
        yield f"DM, {ipc} a class, 256 real", 2560 + n, 2 * n * CONVNET, 2560 * CONVNET, work


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, two seconds a row")
    args = parser.parse_args()
    device = common.setup(common.Args())
    Timer.budget = 2.0 if args.quick or device.type == "cuda" else 10.0
    experts = torch.randn(2, 30, 320010, device=device) / 100
    common.Run = Timer
    mtt.load_experts = haba.load_experts = lambda *_: experts
    low = common.fast_type(experts)
    rates = matmul_rate(device, torch.float32), matmul_rate(device, low)
    speed = f"{rates[0] / 1e9:.0f} GFLOP/s in float32, {rates[1] / 1e9:.0f} in {low}"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {speed}\n")
    print("| one iteration | seconds | images/s | floor | over floor |")
    print("| --- " * 5 + "|")
    for name, images, exact, reduced, work in rows(device, args.quick):
        seconds = measure(work)
        floor = exact / rates[0] + reduced / rates[1]
        numbers = f"{seconds:.3g} | {images / seconds:.0f} | {floor:.3g}"
        print(f"| {name} | {numbers} | {seconds / floor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
