"""Score a distilled file of any of the methods: train fresh networks on it, test them on the real test set.

    python evaluate.py out/haba_cifar10_bpc9.pt --data-dir data

Protocol (the papers' own): five fresh ConvNets, 1000 epochs, the accuracy after the last
epoch, mean and standard deviation; beside it the same protocol on random real images of the same storage. The
data set and its preprocessing have to be those that the file was distilled from. A line of JSON goes to
OUT/results.jsonl. The same file, seed and machine give the same number to the last digit on a CPU.
"""
import argparse
import importlib
import pathlib

import common

METHODS = ("mtt", "haba", "dm", "kfs", "frepo", "translator_fewshot")


def main():
    parser = argparse.ArgumentParser(description="Score a distilled file.", formatter_class=common.HelpFormatter)
    parser.add_argument("file", help="a distilled file, e.g. out/haba_cifar10_bpc9.pt")
    parser.add_argument("--dataset", help="where the real data are, if not under the name in the file")
    parser.add_argument("--data-dir", default="data", help="data sets and caches live here (data)")
    parser.add_argument("--size", type=common.positive, help="resize and crop a folder's pictures (as in the file)")
    parser.add_argument("--seed", type=int, default=0, help="starts of the networks, order, augmentation (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", help="folder for results.jsonl (the file's)")
    common.add_scoring_arguments(parser)
    args = parser.parse_args()

    distilled = common.load_distilled(args.file)
    if distilled["method"] not in METHODS:
        raise common.UserError(f"{args.file} was made by {distilled['method']!r}, which is none of {', '.join(METHODS)}")
    zca = {"zca": True, "zca-trace": "trace"}.get(distilled["preprocess"], False)
    data = common.load_dataset(args.dataset or distilled["dataset"], args.data_dir, zca, args.size
                               or distilled["settings"]["size"], common.pick_device(args.device))
    common.check_fit(args.file, distilled, data)
    method = importlib.import_module(distilled["method"])  # its sampler turns what is stored into training images
    out = args.out or pathlib.Path(args.file).parent
    common.score(data, distilled, *method.sampler(distilled, data.device), out, args.epochs, args.runs, args.seed,
                 getattr(method, "PROTOCOL", common.PROTOCOL))


if __name__ == "__main__":
    common.run(main)
