"""Each method on a GPU: the CPU's numbers, no wait in an iteration, continued after a stop."""

import importlib
from dataclasses import replace

import pytest
import torch
from conftest import relative

import common
import kfs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
MATCHING = dict(experts=1, max_start=1, expert_epochs=1, student_steps=3, step_size=1e-4)
SETTINGS = {"mtt": dict(MATCHING, lr_images=1000.0, lr_step=1e-9), "dm": dict(batch_real=4)}
SETTINGS |= {"haba": dict(MATCHING, lr_bases=10.0, lr_hallucinators=0.01, lr_step=1e-9)}
SETTINGS |= {"kfs": dict(pretrain=2, decoders=2, codes=2), "frepo": dict(pool=2, max_age=2)}
SETTINGS |= {"translator_fewshot": dict(mode="scratch", adapt_steps=3, batch_real=16)}


def compute(device, data):
    torch.manual_seed(0)
    net, codes = common.ConvNet(data.shape, 3).to(device), torch.randn(3, 2, 12, 2, 2)
    decoders = kfs.start_factors(data, kfs.Args(pretrain=0))[1].to(device)
    start = common.flatten(net).cpu()
    moved = start, start + torch.randn_like(start) / 100, data.train, torch.randn(3, 2048), codes
    start, target, images, means, codes = (x.to(device).requires_grad_() for x in moved)
    fitted = images.flatten(1) @ common.krr(images[:12].flatten(1), torch.eye(12, device=device))
    pair, alpha = (images, data.train_labels.to(device)), torch.tensor(0.1, device=device)
    match = common.match_trajectory(net, start.detach(), target.detach(), alpha, lambda n: pair, 3)
    distance = kfs.match_distribution(net, means.detach(), codes, decoders, kfs.Args(), 0)
    return [fitted, *match, images.grad, distance, codes.grad]


def test_same_numbers(exact, data, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for ours, theirs in zip(compute("cuda", data), compute("cpu", data), strict=True):
        assert relative(ours.cpu(), theirs) < 1e-3


class Run(common.Run):
    """Refuses to wait for the GPU within an iteration; may stop after the second."""

    def __init__(self, *args, **inputs):
        super().__init__(*args, **inputs)
        torch.cuda.set_sync_debug_mode("error")

    def step(self, it, loss):
        torch.cuda.set_sync_debug_mode("default")
        self.interrupted = it == 1 and self.path.stem == "broken"
        super().step(it, loss)
        torch.cuda.set_sync_debug_mode("error" if it < 2 else "default")


@pytest.mark.parametrize("method", SETTINGS)
def test_iterations(method, data, tmp_path, monkeypatch):
    """Three iterations without a wait; stopped after the second, continued, the same result."""
    monkeypatch.setattr(common, "Run", Run)
    mean, std = data.preprocess.mean.cuda(), data.preprocess.std.cuda()
    data.preprocess, data.device = replace(data.preprocess, mean=mean, std=std), mean.device
    for name in ("train", "train_labels", "test", "test_labels"):
        setattr(data, name, getattr(data, name).cuda())
    module = importlib.import_module(method)
    args = module.Args(data_dir=str(tmp_path), iterations=3, **SETTINGS[method])
    whole = module.distill(data, args, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        module.distill(data, args, tmp_path / "broken.pt")
    broken = module.distill(data, args, tmp_path / "broken.pt")
    for name in {"images", "codes", "bases"} & whole.keys():
        assert torch.allclose(broken[name], whole[name], rtol=0.01, atol=0.001)
