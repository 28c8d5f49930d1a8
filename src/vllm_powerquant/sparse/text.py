"""What the steps from a checkpoint to a sparse model share: texts as windows of tokens, and the model that reads them.

A window is a run of consecutive tokens of one text, with the tokenizer's BOS in front if it adds one by its own rule. The
built-in texts give only their first half (quality.SPLITS: "calibrate" and "tune"), so that the half that quality is reported
on stays unseen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError
from .families import Model, read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None] | None


def token_windows(
    tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | Path] | None, length: int, tokens: int | None = None
) -> torch.Tensor:
    """[windows, length] int64: whole windows of each text one after the other, what is left at a text's end is dropped.

    Args:
        paths: UTF-8 files; None: the built-in texts' first half
        length: tokens of a window, the BOS included
        tokens: how many to give, rounded down to whole windows that are spread evenly over all texts; None: all there are

    Raises: PowerQuantConfigError for a file that can't be read or is shorter than a window, or too little text
    """
    import torch

    from ..calibration import read_text
    from ..quality import SPLITS, read_texts

    if tokens is not None and tokens < length:
        raise PowerQuantConfigError(f"tokens must be at least one window of {length}, got {tokens}")
    prefix = tokenizer("")["input_ids"][:1]
    body = length - len(prefix)
    if body < 1:
        raise PowerQuantConfigError(f"a window must have 1 token or more beside the BOS, got a length of {length}")
    if paths is None:
        begin, end = SPLITS["calibrate"][0], SPLITS["tune"][1]
        named = read_texts()
    elif paths:
        begin, end = 0.0, 1.0
        named = {str(path): read_text(Path(path)) for path in paths}
    else:
        raise PowerQuantConfigError("texts must be one file or more, got none")

    windows, begins = [], torch.tensor([prefix], dtype=torch.int64)
    # texts are longer than any context: only windows of them are given to the model
    limit, tokenizer.model_max_length = tokenizer.model_max_length, 10**9
    try:
        for name, text in named.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = ids[round(begin * len(ids)) : round(end * len(ids))]
            if len(ids) < body:
                raise PowerQuantConfigError(
                    f"{name} has {len(ids)} tokens, a window takes {body}; use a longer text, join files, or shorten windows"
                )
            whole = torch.tensor(ids[: len(ids) // body * body], dtype=torch.int64).view(-1, body)
            windows.append(torch.cat([begins.expand(len(whole), -1), whole], 1))
    finally:
        tokenizer.model_max_length = limit
    all_windows = torch.cat(windows)
    if tokens is None:
        return all_windows
    count = tokens // length
    if count > len(all_windows):
        raise PowerQuantConfigError(
            f"{tokens} tokens are {count} windows of {length}, the {'built-in ' * (paths is None)}texts give "
            f"{len(all_windows)} ({all_windows.numel()} tokens); ask for fewer or give more text"
        )
    return all_windows[(torch.arange(count) * len(all_windows)) // count]


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found, its configuration read; its weights are loaded on demand."""

    name: str  # as it was given; of the embedded model, its folder
    config: dict[str, Any]  # config.json
    shape: Model

    @property
    def bamboo(self) -> bool:
        return self.shape.family == "bamboo"


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer, ready to run (evaluation mode, no gradients wanted unless asked for)."""

    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def find_checkpoint(name: str | Path | None, family: str | None = None) -> Source:
    """Of a checkpoint folder or name; None: the embedded SmolLM2.

    Args:   family: as for families.read_config
    Raises: PowerQuantConfigError if there is no such checkpoint, PowerQuantUnsupportedError if the format has no place for
            its like, PowerQuantError if a package is missing
    """
    _require_packages()
    from transformers import PreTrainedConfig

    from ..calibration import first_line
    from ..model import prepare_model

    name = str(prepare_model() if name is None else name)
    if not Path(name).is_dir() and (Path(name).is_file() or not _HUB_NAME.fullmatch(name)):
        # a name on the hub is looked up there, which may take long and says nothing of folders
        raise PowerQuantConfigError(f"cannot load {name}: there is no such folder; {_REMEDY}")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PowerQuantConfigError(f"cannot load {name}: {first_line(error)}; {_REMEDY}") from None
    if not config:
        raise PowerQuantConfigError(f"cannot load {name}: it has no config.json; {_REMEDY}")
    return Source(name, config, read_config(config, family))


_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
_REMEDY = "give a checkpoint's folder or name"


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Raises: PowerQuantConfigError if the checkpoint has none that transformers reads"""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from ..calibration import first_line

    # a class that transformers lacks has no tokenizer there either; tokenizer.json says all that there is to know
    kind = PreTrainedTokenizerFast if source.bamboo else AutoTokenizer
    try:
        return kind.from_pretrained(source.name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise PowerQuantConfigError(
            f"cannot load the tokenizer of {source.name}: {first_line(error).rstrip(':')}; give a checkpoint with a "
            "tokenizer.json, or another that transformers reads, beside its config.json"
        ) from None


def choose_device(device: str | None = None) -> torch.device:
    """None: the GPU if there is one. Raises: PowerQuantConfigError for one that is not here"""
    import torch

    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise PowerQuantConfigError(
            f"device must be one that PyTorch finds here, such as cpu or cuda, got {device!r} ({str(error).splitlines()[0]})"
        ) from None
    return chosen


def load_causal_lm(
    name: str | Path | Source | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    *,
    family: str | None = None,
    say: Say = None,
) -> LoadedModel:
    """A checkpoint's model and tokenizer.

    Args:
        name: folder or name, None for the embedded SmolLM2; or what find_checkpoint gave
        dtype: of the weights; None: float32
        device: None: the GPU if there is one
        family: as for families.read_config; "bamboo" also applies ReLU to the up projection
        say: is told which model goes where; None also hides transformers' own progress

    Raises: as find_checkpoint; PowerQuantConfigError for a device that is not here, or if loading fails
    """
    import torch
    from safetensors import SafetensorError

    source = name if isinstance(name, Source) else find_checkpoint(name, family)
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    from ..calibration import first_line

    chosen = choose_device(device)
    dtype = dtype or torch.float32
    from transformers.utils import logging

    if say is None:
        # one bar at most on a quiet run: transformers shows one for loading
        logging.disable_progress_bar()
    else:
        say(f"{source.name}: {source.shape.num_layers} layers, {str(dtype).removeprefix('torch.')} on {chosen}")
    tokenizer = load_tokenizer(source)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    # it warns of tensors that are missing or have another shape in a table; here that is one error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if source.bamboo:
            # transformers has no Bamboo; but for the second ReLU it is Mistral, with the same names
            given = source.config | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "relu"}
            given = {"sliding_window": None} | {key: value for key, value in given.items() if key != "auto_map"}
            model, info = MistralForCausalLM.from_pretrained(source.name, config=MistralConfig(**given), **options)
            for layer in model.model.layers:
                layer.mlp.up_proj.register_forward_hook(_relu_of_output)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(source.name, **options)
        if missing := sorted(info["missing_keys"]):
            raise PowerQuantConfigError(
                f"cannot load {source.name}: it lacks {len(missing)} tensors, the first is {missing[0]}; {_REMEDY}"
            )
        if mismatched := sorted(info["mismatched_keys"]):
            name, got, wanted = mismatched[0]
            raise PowerQuantConfigError(
                f"cannot load {source.name}: {name} must have shape {list(wanted)} by config.json, got {list(got)}; "
                f"{_REMEDY}"
            )
        model = model.eval().to(chosen)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, PowerQuantError):
            raise
        raise PowerQuantConfigError(f"cannot load {source.name}: {first_line(error)}; {_REMEDY}") from None
    finally:
        logging.set_verbosity(verbosity)
    return LoadedModel(source, model, tokenizer, chosen)


def check_seed(seed: int) -> None:
    """Raises: PowerQuantConfigError for one that PyTorch's generators, given a few million times as much, do not take"""
    if not 0 <= seed < 1 << 32:
        raise PowerQuantConfigError(f"seed must be 0 to {(1 << 32) - 1}, got {seed}")


def _relu_of_output(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.relu()


def _require_packages() -> None:
    try:
        import safetensors  # noqa: F401
        import tqdm  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise PowerQuantError(
            f"{error.name} is not installed; run: pip install 'vllm-powerquant[sparse,hf,model]'"
        ) from error
