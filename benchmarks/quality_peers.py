"""KV-cache codecs of other packages from PyPI as Transformers caches, for bench_quality.py; only what they export is called.

Every peer gets the same exact keys and values of a prompt, and its best setting for a window of 128 exact tokens:

    tqai              its TurboQuantDynamicCache, strategy "residual"; also with 4 exact sinks, which it can keep
    fused-turboquant  its codec TurboQuantMSE in a CodecLayer; it has no window: one is lent to it, and left out
    turbo-attn        its codec TkvCodec in a CodecLayer, likewise; its server keeps the newest tokens in 8 bits, not in 16
    tiny-turboquant   its TinyKVCache; it packs blocks of 128 tokens, so that 128 to 255 are exact
    quanto, hqq       Transformers' QuantizedCache, 4 bits for keys and values, which it does not tell apart; it packs the
                      whole prompt at once and fills its window with what follows; groups of 64, its default, or of 32

Only the versions that benchmarks/results has figures of are accepted. turbo-attn is imported as tkv; what it requires is for
GPU kernels, and its codec does without.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedCache

from vllm_powerquant.calibration import ModelShape
from vllm_powerquant.errors import PowerQuantError, PowerQuantUnsupportedError

WINDOW = 128


@dataclass(frozen=True)
class Package:
    """A distribution on PyPI. pip: what to install, where that is more or less than the distribution."""

    distribution: str
    version: str
    pip: str = ""

    def require(self) -> None:
        """Raises PowerQuantError if it is not installed in this version."""
        command = f"pip install {self.pip or self.distribution}=={self.version}"
        try:
            installed = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise PowerQuantError(f"{self.distribution} is not installed; run: {command}") from None
        if installed != self.version:
            raise PowerQuantError(f"{self.distribution} {installed} is installed, not {self.version}; run: {command}")


PACKAGES = {
    "tqai": Package("tqai", "0.6.1"),
    "fused-turboquant": Package("fused-turboquant", "0.1.0"),
    "turbo-attn": Package("turbo-attn", "0.70.1", "--no-deps turbo-attn"),
    "tiny-turboquant": Package("tiny-turboquant", "0.18.0"),
    "quanto": Package("optimum-quanto", "0.2.7"),
    "hqq": Package("hqq", "0.2.8.post1"),
}


@dataclass(frozen=True)
class Codec:
    """round_trip: vectors [..., head_size] -> what they are read back as, fp32; vector_bytes: of one packed vector"""

    round_trip: Callable[[torch.Tensor], torch.Tensor]
    vector_bytes: int


class CodecLayer(DynamicLayer):
    """One layer whose tokens become what their codec makes of them once they leave the window; ReferenceLayer's rule.

    A chunk is exact for its own queries, and so are the window - 1 tokens before it.
    """

    def __init__(self, key_codec: Codec, value_codec: Codec, window: int = WINDOW) -> None:
        super().__init__()
        self.key_codec, self.value_codec, self.window = key_codec, value_codec, window
        self.packed_until = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append a chunk [batch, num_kv_heads, n, head_size] -> keys, values of the whole sequence."""
        start, end = self.packed_until, self.get_seq_length() - max(self.window - 1, 0)
        if end > start:
            for held, codec in ((self.keys, self.key_codec), (self.values, self.value_codec)):
                held[..., start:end, :] = codec.round_trip(held[..., start:end, :]).to(held.dtype)
            self.packed_until = end
        return super().update(key_states, value_states)

    def held_bytes(self) -> int:
        """What the codec's format takes for the packed tokens, and the window; the tensors here are all in 16 bits."""
        batch, heads, length, head_size = self.keys.shape
        exact = min(length, self.window)
        packed = self.key_codec.vector_bytes + self.value_codec.vector_bytes
        return batch * heads * ((length - exact) * packed + exact * 2 * head_size * self.keys.element_size())


class ForwardingLayer(DynamicLayer):
    """Hands a layer's chunks to a cache that keeps no layers of its own, from which Transformers would size its masks.

    Args: cache: has update(keys, values, layer) -> keys, values and get_seq_length(layer)
    """

    def __init__(self, cache: Cache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return self.cache.update(key_states, value_states, self.index)

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length(self.index)


def tqai(config: PretrainedConfig, seed: int, chunk: int, bits: tuple[int, int], sinks: int = 0) -> Cache:
    from tqai import TurboQuantConfig
    from tqai.cache.hf import TurboQuantDynamicCache

    key_bits, value_bits = bits
    # its window counts the chunk that is being decoded: so many tokens are CodecLayer's 127 before it and the chunk
    options = TurboQuantConfig(
        bits_k=key_bits,
        bits_v=value_bits,
        seed=42 + 100_000 * seed,  # 42 is its default; layers count on from it
        sink_tokens=sinks,
        backend="torch",
        cache_strategy="residual",
        residual_window=WINDOW - 1 + chunk,
    )
    cache = TurboQuantDynamicCache(options)
    return Cache(layers=[ForwardingLayer(cache, i) for i in range(ModelShape.of(config).layers)])


def fused_turboquant(config: PretrainedConfig, seed: int, chunk: int, bits: tuple[int, int], window: int = WINDOW) -> Cache:
    from fused_turboquant import TurboQuantMSE

    shape = ModelShape.of(config)

    def codec(bits: int, index: int) -> Codec:
        # as its TurboQuantKVCache counts seeds: 42, a key's and a value's for each layer
        coder = TurboQuantMSE(shape.head_size, bits=bits, seed=42 + 100_000 * seed + index)
        one = coder.encode(torch.ones(1, shape.head_size))
        return Codec(coder.roundtrip, one.indices.nbytes + one.norms.nbytes)

    layers = [CodecLayer(codec(bits[0], 2 * i), codec(bits[1], 2 * i + 1), window) for i in range(shape.layers)]
    return Cache(layers=layers)


def turbo_attn(config: PretrainedConfig, seed: int, chunk: int, bits: tuple[int, int], window: int = WINDOW) -> Cache:
    from tkv import TkvCodec

    shape = ModelShape.of(config)
    coder = TkvCodec(head_dim=shape.head_size, k_bit_width=bits[0], v_bit_width=bits[1])
    keys = Codec(lambda x: coder.decompress_k(*coder.compress_k(x)), coder.bytes_per_k_vector)
    values = Codec(lambda x: coder.decompress_v(*coder.compress_v(x)), coder.bytes_per_v_vector)
    return Cache(layers=[CodecLayer(keys, values, window) for _ in range(shape.layers)])


def tiny_turboquant(
    config: PretrainedConfig, seed: int, chunk: int, bits: tuple[int, int], group: int | None = None
) -> Cache:
    from tiny_turboquant import TinyKVCache

    return TinyKVCache(key_bits=bits[0], value_bits=bits[1], residual_len=WINDOW, block_size=128, value_group_size=group)


def transformers_quantized(
    config: PretrainedConfig, seed: int, chunk: int, backend: str, axis: int = 0, group: int = 64
) -> Cache:
    """axis: 0 for quanto and 1 for HQQ, as Transformers advises. There HQQ cannot pack an odd number of groups, as those of
    64 of 1,023 tokens x 3 heads of 64 are."""
    try:
        return QuantizedCache(
            backend, config, nbits=4, axis_key=axis, axis_value=axis, q_group_size=group, residual_length=WINDOW
        )
    except ValueError as error:
        raise PowerQuantUnsupportedError(str(error)) from error


@dataclass(frozen=True)
class Configuration:
    """make(config, seed, chunk, **options) -> Cache; seeded: whether a seed changes what it does."""

    package: str
    make: Callable[..., Cache]
    options: dict = field(default_factory=dict)
    seeded: bool = False


def _configurations() -> dict[str, Configuration]:
    found = {}
    both = (("K4/V4", {"bits": (4, 4)}), ("K4/V2", {"bits": (4, 2)}))
    for bits, options in both:
        found[f"tqai {bits}, window 128"] = Configuration("tqai", tqai, options, seeded=True)
        found[f"tqai {bits}, window 128, 4 sinks"] = Configuration("tqai", tqai, {**options, "sinks": 4}, seeded=True)
    for package, make, seeded in (("fused-turboquant", fused_turboquant, True), ("turbo-attn", turbo_attn, False)):
        for bits, options in both:
            found[f"{package} {bits}, window 128"] = Configuration(package, make, options, seeded)
            found[f"{package} {bits}, no window"] = Configuration(package, make, {**options, "window": 0}, seeded)
    for bits, options in (*both, ("K4/V2 in groups of 32", {"bits": (4, 2), "group": 32})):
        found[f"tiny-turboquant {bits}, window 128"] = Configuration("tiny-turboquant", tiny_turboquant, options)
    for name, package, options in (
        ("quanto K4/V4", "quanto", {}),
        ("quanto K4/V4 in groups of 32", "quanto", {"group": 32}),
        ("hqq K4/V4 in groups of 32", "hqq", {"axis": 1, "group": 32}),
    ):
        found[f"{name}, window 128"] = Configuration(package, transformers_quantized, {"backend": package, **options})
    return found


CONFIGURATIONS = _configurations()


def select(peers: Sequence[str]) -> list[str]:
    """Names of the configurations of these peers.

    Raises: PowerQuantError if a package is missing.
    """
    for peer in peers:
        PACKAGES[peer].require()
    return [name for name, configuration in CONFIGURATIONS.items() if configuration.package in peers]


def make_cache(name: str, config: PretrainedConfig, seed: int, chunk: int) -> Cache:
    """An empty cache of a configuration, for a model's text config and tokens decoded `chunk` at a time.

    Raises: PowerQuantUnsupportedError if the peer refuses the model.
    """
    configuration = CONFIGURATIONS[name]
    return configuration.make(config, seed, chunk, **configuration.options)


def held_bytes(cache: Cache) -> int:
    """Bytes of the storages that a cache's tensors keep alive, or, for codecs alone, of their format.

    Tables that serve every request (rotations, codebooks) lie in objects of other kinds and are not counted.
    """
    counted = [layer for layer in cache.layers if isinstance(layer, CodecLayer)]
    if counted:
        return sum(layer.held_bytes() for layer in counted)
    storages, seen, rest = {}, set(), [cache]
    while rest:
        x = rest.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            if hasattr(x, "__tensor_flatten__"):  # quanto's packed tensors are made of others
                rest += [getattr(x, name) for name in x.__tensor_flatten__()[0]]
            else:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            rest += x.values()
        elif isinstance(x, (list, tuple)):
            rest += x
        elif isinstance(x, (Cache, CacheLayerMixin)):
            rest += vars(x).values()
    return sum(storages.values())
