"""Compiles a block ahead of time for the C++ program beside this file: python export.py FOLDER

Writes block.pt2 (AOTInductor's package, for any batch and any image size) and cases.pt (images of sizes other than the
exported one, each with the block's output in Python).
"""

import pathlib
import sys

import torch
from torch.export import Dim

from dnl_ext import DisentangledNonLocal2d

SIZES = ((1, 12, 20), (3, 17, 9), (2, 32, 32))


def make_block():
    """A block with every term at work; a fresh one is the identity."""
    torch.manual_seed(0)
    block = DisentangledNonLocal2d.mmseg(in_channels=16, reduction=2).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@torch.no_grad()
def write(folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    block = make_block()
    dynamic = {"x": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}}
    program = torch.export.export(block, (torch.randn(2, 16, 8, 10),), dynamic_shapes=dynamic)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "block.pt2"))
    images = [torch.randn(batch, 16, height, width) for batch, height, width in SIZES]
    torch.save([[image, block(image)] for image in images], folder / "cases.pt")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python export.py FOLDER")
    write(sys.argv[1])
