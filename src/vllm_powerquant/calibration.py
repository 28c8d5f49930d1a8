"""What is measured of a model before it is served: `powerquant calibrate` writes it, the caches read it.

Softmax does not see a constant added to every key of a head. Taking off the mean key of each head (its centre) before keys
are packed leaves less to round, and costs nothing when they are read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from .errors import PowerQuantConfigError, PowerQuantUnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "vllm-powerquant calibration 1"


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
    rope_theta: tuple[float, ...]  # of every kind of layer, ascending

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """Args: config: of the model's text part, as Transformers and vLLM have it"""
        heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            query_heads=heads,
            hidden_size=config.hidden_size,
            vocabulary=config.vocab_size,
            rope_theta=tuple(sorted(set(_rope_thetas(getattr(config, "rope_parameters", None) or {})))),
        )


def _rope_thetas(parameters: dict[str, Any]) -> Iterable[float]:
    for name, value in parameters.items():
        if isinstance(value, dict):
            yield from _rope_thetas(value)
        elif name == "rope_theta":
            yield float(value)


@dataclass(frozen=True)
class Calibration:
    """key_centres [layers, kv_heads, head_size] fp32: mean keys, as a cache sees them (after RoPE)."""

    key_centres: torch.Tensor
    shape: ModelShape
    model: str  # name or path of what was calibrated
    tokens: int  # of text it was calibrated on

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        about = {"shape": asdict(self.shape), "model": self.model, "tokens": self.tokens}
        save_file({"key_centres": self.key_centres.contiguous()}, path, {"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises: PowerQuantConfigError if the file is missing or none that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise PowerQuantConfigError(f"no calibration file {path}; `powerquant calibrate MODEL -o {path}` makes one")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise PowerQuantConfigError(f"{path} is not a safetensors file ({error})") from None
        if metadata.get("format") != FORMAT or set(tensors) != {"key_centres"}:
            raise PowerQuantConfigError(
                f"{path} is no calibration that this version reads (format {metadata.get('format')!r}, tensors "
                f"{', '.join(sorted(tensors)) or 'none'}); make one with `powerquant calibrate`"
            )
        about = json.loads(metadata["about"])
        shape = ModelShape(**about["shape"] | {"rope_theta": tuple(about["shape"]["rope_theta"])})
        centres = tensors["key_centres"]
        expected = (shape.layers, shape.kv_heads, shape.head_size)
        if centres.shape != expected or centres.dtype != torch.float32 or not centres.isfinite().all():
            raise PowerQuantConfigError(
                f"{path} should hold finite fp32 key centres {expected}, got {centres.dtype} {tuple(centres.shape)}"
            )
        return cls(centres, shape, about["model"], about["tokens"])

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


@torch.inference_mode()
def key_centres(model: PreTrainedModel, runs: Iterable[Sequence[int]]) -> torch.Tensor:
    """Mean key of every head over runs of token ids: [layers, kv_heads, head_size] fp32.

    Raises: PowerQuantUnsupportedError if the layers' keys differ in shape, or some keep none.
    """
    from transformers.cache_utils import DynamicCache

    sums, tokens = None, 0
    for ids in runs:
        cache = DynamicCache()
        model(torch.tensor(ids, device=model.device)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        shapes = {tuple(layer.keys.shape) for layer in cache.layers}
        if len(shapes) != 1 or len(cache.layers) != model.config.get_text_config().num_hidden_layers:
            raise PowerQuantUnsupportedError(
                f"calibration needs keys of one shape in every layer, got {len(cache.layers)} layers with {shapes}"
            )
        total = torch.stack([layer.keys[0].double().sum(1) for layer in cache.layers])
        sums = total if sums is None else sums + total
        tokens += len(ids)
    return (sums / tokens).float().cpu()


def calibrate(
    name: str | None = None, texts: Sequence[Path] | None = None, run_tokens: int = 1024, runs: int = 2
) -> Calibration:
    """Measure a checkpoint (None: the embedded SmolLM2) on texts (None: the calibration part of the built-in ones).

    Args:   run_tokens, runs: of each text, so many runs of so many tokens, each with the tokenizer's BOS if it has one
    Raises: PowerQuantConfigError if a text is too short for a run; PowerQuantUnsupportedError as key_centres
    """
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .model import prepare_model
    from .quality import SPLITS, cut, read_texts

    name = name or str(prepare_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    # texts are longer than any context: only cut pieces of them are given to the model
    tokenizer.model_max_length = 10**9
    prefix = tokenizer("")["input_ids"][:1]
    named = {path.name: path.read_text(encoding="utf-8") for path in texts} if texts else read_texts()
    part = (0.0, 1.0) if texts else SPLITS["calibrate"]
    pieces = []
    for text_name, text in named.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [[*prefix, *run] for run in cut(ids, part, run_tokens - len(prefix), runs, text_name)]
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    if torch.cuda.is_available():
        model = model.cuda()
    centres = key_centres(model, tqdm(pieces, "calibrating", unit="run"))
    shape = ModelShape.of(model.config.get_text_config())
    return Calibration(centres, shape, name, sum(map(len, pieces)))
