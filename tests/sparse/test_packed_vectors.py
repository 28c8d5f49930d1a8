"""The examples of the cache format that the C++ engine is tested with are what this package stores."""

import packed_vectors
import pytest
import torch

from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels.cpu_kernels import CpuKernels


def test_the_reference_makes_this_file():
    written = packed_vectors.DATA_FILE.read_text(encoding="ascii")
    assert written == packed_vectors.text(), "if the format changed: python tests/sparse/packed_vectors.py"


@pytest.mark.parametrize("head_size", packed_vectors.HEAD_SIZES)
def test_the_cpu_kernel_stores_the_same_bytes(head_size):
    contents = packed_vectors.tokens(head_size)
    cache_format = CacheFormat(head_size)
    vectors = torch.stack([x for _, _, x in contents])
    cache = torch.full((1, 1, 64, cache_format.layout.slot_bytes), 0xA5, dtype=torch.uint8)
    slots = torch.tensor([token for token, _, _ in contents])
    CpuKernels(cache_format).store(cache, vectors[:, :1], vectors[:, 1:], slots)
    assert torch.equal(cache.flatten(), packed_vectors.page(cache_format, contents)[1])
