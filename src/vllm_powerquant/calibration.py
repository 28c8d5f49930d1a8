"""What is measured of a model before it is served: `powerquant calibrate` writes it, the caches read it.

Softmax does not see a constant added to every key of a head, and a score q.k stays the same if a channel of the keys is
multiplied by what that channel of the queries is divided by. So keys are packed as (k - centre) * scale. Without their mean
less is left to round; and scales put the codec's error, which a random rotation spreads over all channels alike, where
queries are small. The error of q.k is proportional to sum(E[q_i^2] / scale_i^2) * sum(Var[k_i] scale_i^2) over channels i,
and least for scale_i^4 = E[q_i^2] / Var[k_i] (Cauchy and Schwarz). Scales are powers of two, which change no bit of a 16-bit
key or query but its exponent.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from .errors import PowerQuantConfigError, PowerQuantUnsupportedError
from .files import whole_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "vllm-powerquant calibration 1"
# first tokens of a run that are left out: by default they are kept exactly, and their keys lie elsewhere
SINKS = 4
# tokens of a run, at least: fewer say little
MIN_RUN_TOKENS = 64
# so that 16-bit keys and queries stay in range
MAX_SCALE = 16.0


@dataclass(frozen=True)
class ModelShape:
    """What a calibration must have in common with the model it is used for. Fine-tunes of a model share it."""

    model_type: str
    layers: int
    kv_heads: int
    head_size: int
    query_heads: int
    hidden_size: int
    vocabulary: int
    rope: str  # what decides the angles of rotary embeddings, as JSON

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """Args: config: of the model's text part, as Transformers and vLLM have it"""
        heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=head_size_of(config),
            query_heads=heads,
            hidden_size=config.hidden_size,
            vocabulary=config.vocab_size,
            rope=json.dumps(_rope(getattr(config, "rope_parameters", None) or {}), sort_keys=True),
        )


def head_size_of(config: PretrainedConfig) -> int | None:
    """Args: config: of a model's text part, or of one of its layers where they differ. Returns: None without attention"""
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


_ROPE = ("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings")


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Of each kind of layer, or of all of them."""
    nested = {name: _rope(value) for name, value in parameters.items() if isinstance(value, dict)}
    if nested or not parameters:
        return nested
    numbers = {name: float(parameters[name]) for name in _ROPE if parameters.get(name) is not None}
    return numbers | {"rope_type": parameters.get("rope_type", "default")}


@dataclass(frozen=True)
class KeyStatistics:
    """Of every layer and head [layers, kv_heads, head_size] fp32, as a cache sees keys (after RoPE).

    centres: mean keys. scales: what each channel is multiplied by before keys are packed, powers of two within 1 / MAX_SCALE
    .. MAX_SCALE.
    """

    centres: torch.Tensor
    scales: torch.Tensor

    def frames(self) -> torch.Tensor:
        """[layers, kv_heads, 3, head_size] fp32: what reference.in_frame and the kernels take of each layer."""
        return torch.stack((self.centres, self.scales, 1 / self.scales), 2)


@dataclass(frozen=True)
class Calibration:
    keys: KeyStatistics
    shape: ModelShape
    model: str  # name or path of what was calibrated
    tokens: int  # of text it was calibrated on

    def save(self, path: Path) -> None:
        """Raises: PowerQuantConfigError if it cannot be written there."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        about = {"shape": asdict(self.shape), "model": self.model, "tokens": self.tokens}
        tensors = {"key_centres": self.keys.centres.contiguous(), "key_scales": self.keys.scales.contiguous()}
        try:
            with whole_file(Path(path)) as unfinished:
                save_file(tensors, unfinished, {"format": FORMAT, "about": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise PowerQuantConfigError(f"cannot write {path}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises: PowerQuantConfigError if the file is missing or none that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        remedy = "make one with `powerquant calibrate MODEL -o FILE.safetensors`"
        try:
            open(path, "rb").close()
        except OSError as error:
            raise PowerQuantConfigError(f"cannot read the calibration file {path}: {error.strerror}; {remedy}") from None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise PowerQuantConfigError(f"{path} is not a safetensors file ({error}); {remedy}") from None
        if metadata.get("format") != FORMAT or set(tensors) != {"key_centres", "key_scales"}:
            raise PowerQuantConfigError(
                f"{path} is no calibration that this version reads (format {metadata.get('format')!r}, tensors "
                f"{', '.join(sorted(tensors)) or 'none'}); {remedy}"
            )
        try:
            about = json.loads(metadata["about"])
            calibration = cls(
                KeyStatistics(tensors["key_centres"], tensors["key_scales"]),
                ModelShape(**about["shape"]),
                str(about["model"]),
                int(about["tokens"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PowerQuantConfigError(f"{path} does not say what it was made of ({error!r}); {remedy}") from None
        if problem := calibration._problem():
            raise PowerQuantConfigError(f"{path}: {problem}; {remedy}")
        return calibration

    def _problem(self) -> str | None:
        """What is wrong with the numbers."""
        expected = (self.shape.layers, self.shape.kv_heads, self.shape.head_size)
        for name, tensor in (("key_centres", self.keys.centres), ("key_scales", self.keys.scales)):
            if tensor.shape != expected or tensor.dtype != torch.float32:
                return f"{name} should be torch.float32 {expected}, got {tensor.dtype} {tuple(tensor.shape)}"
            if not tensor.isfinite().all():
                return f"{name} are not all finite"
        if not torch.equal(self.keys.scales, _power_of_two(self.keys.scales)):
            return f"key_scales should be powers of two from 1/{MAX_SCALE:g} to {MAX_SCALE:g}"
        return None

    def check(self, config: PretrainedConfig, path: str | Path) -> None:
        """Raises PowerQuantConfigError, naming what differs, if this was not made with a model of the same shape."""
        mine, wanted = asdict(self.shape), asdict(ModelShape.of(config))
        differences = [f"{name} {mine[name]}, the model's {wanted[name]}" for name in mine if mine[name] != wanted[name]]
        if differences:
            raise PowerQuantConfigError(
                f"{path} was calibrated on {self.model}, another model: {'; '.join(differences)}; make one for this model "
                "with `powerquant calibrate`, or leave the calibration out"
            )


@functools.cache
def load_calibration(path: str) -> Calibration:
    """Calibration.load, once a process."""
    return Calibration.load(path)


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(1 / MAX_SCALE, MAX_SCALE).log2().round().exp2()


@contextlib.contextmanager
def watched_attention(model: PreTrainedModel, see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Meanwhile every attention layer of a model calls see(layer, query, key), with what a cache is given.

    query [batch, num_heads, n, head_size], key [batch, num_kv_heads, n, head_size]: after RoPE.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def watched(module, query, key, value, mask, **options):
        see(module.layer_idx, query, key)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("powerquant_watched", watched)
    AttentionMaskInterface.register("powerquant_watched", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("powerquant_watched")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def key_statistics(model: PreTrainedModel, runs: Iterable[Sequence[int]]) -> KeyStatistics:
    """Of a model's keys and queries over runs of token ids.

    Raises: PowerQuantUnsupportedError if some layer has no keys, or layers' keys differ in shape.
    """
    sums: dict[int, list] = {}  # by layer: tokens, sum of k, of k^2, of q^2 over tokens and the group's heads

    def see(layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        q, k = query[0, :, SINKS:].double(), key[0, :, SINKS:].double()
        by_head = q.unflatten(0, (len(k), -1)).square().mean(1).sum(1)
        new = [k.shape[1], k.sum(1), k.square().sum(1), by_head]
        old = sums.setdefault(layer, [0, 0, 0, 0])
        sums[layer] = [a + b for a, b in zip(old, new, strict=True)]

    with watched_attention(model, see):
        for ids in runs:
            model(torch.tensor(ids, device=model.device)[None], use_cache=False, logits_to_keep=1)
    layers = model.config.get_text_config().num_hidden_layers
    shapes = {tuple(total[1].shape) for total in sums.values()}
    if len(shapes) != 1 or sorted(sums) != list(range(layers)):
        raise PowerQuantUnsupportedError(
            f"calibration needs keys of one shape in each of {layers} layers, got {len(sums)} layers with {sorted(shapes)}; "
            "serve this model without calibration (layers that do not go through Transformers' attention interface are "
            "not seen)"
        )
    n = sums[0][0]
    k, k_square, q_square = (torch.stack([sums[i][x] for i in range(layers)]).cpu() / n for x in (1, 2, 3))
    spread, weight = k_square - k.square(), q_square
    # channels that hardly move have no scale of their own
    spread, weight = (x.maximum(1e-3 * x.mean(-1, keepdim=True)).clamp(min=1e-12) for x in (spread, weight))
    scales = (weight / spread) ** 0.25
    scales /= scales.log().mean(-1, keepdim=True).exp()
    return KeyStatistics(k.float(), _power_of_two(scales.float()))


def calibrate(
    name: str | None = None, texts: Sequence[Path] | None = None, run_tokens: int = 1024, runs: int = 2
) -> Calibration:
    """Measure a checkpoint (None: the embedded SmolLM2) on texts (None: the calibration part of the built-in ones).

    Args:   run_tokens, runs: of each text, so many runs of so many tokens, each with the tokenizer's BOS if it has one
    Raises: PowerQuantConfigError if there is no such model or text, or a text is too short for a run, or a run is shorter
            than MIN_RUN_TOKENS or longer than the model's context; PowerQuantUnsupportedError as key_statistics
    """
    if run_tokens < MIN_RUN_TOKENS or runs < 1:
        raise PowerQuantConfigError(
            f"calibration needs 1 run or more (--runs) of {MIN_RUN_TOKENS} tokens or more (--tokens), got {runs} of "
            f"{run_tokens}"
        )
    try:
        from tqdm import tqdm
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise PowerQuantConfigError(f'calibration needs Transformers ({error}); pip install ".[hf,model]"') from None
    from .model import prepare_model
    from .quality import SPLITS, cut, read_texts

    name = name or str(prepare_model())
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PowerQuantConfigError(f"cannot load {name}: {first_line(error)}; give a checkpoint's folder or name") from None
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or run_tokens
    if run_tokens > context:
        raise PowerQuantConfigError(
            f"a run of {run_tokens} tokens (--tokens) is longer than the model's context of {context}"
        )
    # texts are longer than any context: only cut pieces of them are given to the model
    tokenizer.model_max_length = 10**9
    prefix = tokenizer("")["input_ids"][:1]
    named = {str(path): read_text(path) for path in texts} if texts else read_texts()
    part = (0.0, 1.0) if texts else SPLITS["calibrate"]
    pieces = []
    for text_name, text in named.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [[*prefix, *run] for run in cut(ids, part, run_tokens - len(prefix), runs, text_name)]
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PowerQuantConfigError(f"cannot load {name}: {first_line(error)}; give a checkpoint's folder or name") from None
    if torch.cuda.is_available():
        model = model.cuda()
    keys = key_statistics(model, tqdm(pieces, "calibrating", unit="run"))
    calibration = Calibration(keys, ModelShape.of(model.config.get_text_config()), name, sum(map(len, pieces)))
    if problem := calibration._problem():
        raise PowerQuantUnsupportedError(f"{name} cannot be calibrated: {problem}; serve it without calibration")
    return calibration


def first_line(error: Exception) -> str:
    """Of its message, else its kind: what an error of one line may quote."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_text(path: Path) -> str:
    """Raises: PowerQuantConfigError if it can't be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PowerQuantConfigError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise PowerQuantConfigError(f"cannot read {path}: {error.strerror}") from None
