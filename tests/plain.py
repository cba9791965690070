"""The trajectory match written plainly, for tests to compare with: autograd keeps the graph of all steps."""
import pathlib
import re
import resource
import sys

import torch
import torch.nn.functional as F
from torch.func import functional_call


def plain_match(net, start, target, step_size, batch, steps):
    """HaBa Eq. (7) and its gradient, added to .grad of all leaves, step_size's among them -> loss."""
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    student = start.clone().requires_grad_()
    for n in range(steps):
        images, labels = batch(n)
        parts = student.split([shape.numel() for shape in shapes])
        parameters = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes)}
        loss = F.cross_entropy(functional_call(net, parameters, (images,)), labels)
        gradient, = torch.autograd.grad(loss, student, create_graph=True)
        student = student - step_size * gradient
    loss = ((student - target) ** 2).sum() / ((start - target) ** 2).sum()
    loss.backward()
    return loss.detach()


def peak(way, images, steps):
    """Peak memory of this process in MB after one match of `steps` steps with the full-width ConvNet."""
    import common
    torch.manual_seed(0)
    net = common.ConvNet((3, 32, 32), 10)
    start = common.flat_parameters(net)
    x, y = torch.randn(images, 3, 32, 32, requires_grad=True), torch.arange(images) % 10
    common.chunk_size = lambda device: 64
    step_size = torch.tensor(0.01, requires_grad=True)
    {"ours": common.match_trajectory, "plain": plain_match}[way](
        net, start, start + 0.01, step_size, lambda n: (x, y), steps)
    return peak_memory()


def peak_memory():
    """Peak resident memory of this process in MB."""
    status = pathlib.Path("/proc/self/status")  # on Linux ru_maxrss starts from the parent's: pytest's
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":  # python plain.py REPOSITORY ours|plain IMAGES STEPS
    sys.path.insert(0, sys.argv[1])
    torch.set_num_threads(1)
    print(peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
