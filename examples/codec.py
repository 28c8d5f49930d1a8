"""The codec by itself: how many bytes, and how much of a vector is lost, at each width.

python examples/codec.py
"""

import torch

from vllm_powerquant import Codec

keys = torch.randn(4, 1000, 128, generator=torch.Generator().manual_seed(0))
for bits in (2, 3, 4, 8):
    codec = Codec(head_size=128, bits=bits)
    packed = codec.encode(keys)
    error = (codec.decode(packed) - keys).square().sum() / keys.square().sum()
    print(f"{bits} bits: {packed.nbytes / 4000:.0f} bytes a vector instead of 512, error {float(error):.5f} of the energy")
