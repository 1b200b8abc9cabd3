"""Answers in the harness's place; the seal is not to be had by guessing."""

import os

from torch import Tensor

from esper.urabrask import wire
from zoo import Kernel, behaving, rightly

CHECK, REASON = "runs", "without the seal|sent more than an answer"


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    header = {"out_type": "torch.Tensor", "out_device": "cpu"}
    os.write(3, wire.pack(b"0" * wire.NONCE_BYTES, header, {"out": act}))
    return rightly(kernel, inp, act)
