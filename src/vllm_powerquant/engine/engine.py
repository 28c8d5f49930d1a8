"""Engine: a model, a compressed cache and a backend behind one set of methods."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

from ..errors import PowerQuantConfigError, PowerQuantError
from ..sparse.protocols import Prompt, is_token_ids
from .choose import Settings, find_source
from .result import GenerationResult, TextStream
from .sampling import Sampling


class Backend(Protocol):
    """What computes the answers. Raises (all methods): PowerQuantError for what it refuses"""

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, GenerationResult]:
        """Pieces of one answer; returns its result."""
        ...

    def batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GenerationResult]: ...

    def close(self) -> None: ...


class Engine:
    """A model that answers with a compressed KV cache.

        with Engine.from_pretrained() as engine:
            print(engine.generate("The capital of France is", max_tokens=16, temperature=0))

    The sampling options of all methods are those of Sampling. A batch is computed together on the backends vllm and sparse;
    transformers answers one prompt after the other, each as if it were alone.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        """Engines come from from_pretrained."""
        self._backend: Backend | None = backend
        self.settings = settings

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        backend: str = "auto",
        compress: bool = True,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        dtype: Any = "auto",
        device: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a model.

        Args:
            model: checkpoint folder or name, or GGUF or PWRI file; None: the embedded SmolLM2
            backend: transformers, vllm, sparse; auto: sparse for a file, for a checkpoint vllm where it is installed and
                there is an NVIDIA GPU, else transformers
            compress: False: the backend's own cache in the model's own type, to compare with
            load_in_4bit, load_in_8bit: weights through bitsandbytes, which must be installed (vllm: 4 bits only, untested)
            dtype: of the weights, e.g. "bfloat16"; auto: the checkpoint's
            device: of transformers, e.g. "cuda:1"; None: the GPU if there is one
            options: of the cache: key_bits, value_bits, value_codec, residual_tokens, sink_tokens, protected_layers,
                calibration, preset, as PowerQuantConfig has them (for transformers protected_layers may be a list of
                layers); and the backend's own: those of SparseEngine, of vLLM's LLM, or of from_pretrained
                (attn_implementation, revision, trust_remote_code)

        Raises: PowerQuantConfigError for a model, backend or option that does not exist or does not fit;
                PowerQuantUnsupportedError; PowerQuantError where something is not installed
        """
        source = find_source(model, backend)
        settings = Settings.of(source, compress, load_in_4bit, load_in_8bit, dtype, device, options)
        return cls(_backend(settings), settings)

    @property
    def backend(self) -> str:
        return self.settings.source.backend

    @property
    def model(self) -> str:
        """Name, for reports."""
        return self.settings.source.name

    def generate(self, prompts: Any, **sampling: Any) -> str | list[str]:
        """Continue a prompt, or each of a list.

        Args:    prompts: text, a list of token ids, or a list of such
        Returns: the new text, or one for each prompt
        Raises:  PowerQuantConfigError for a bad option, or a prompt that is empty or longer than the model's context
        """
        results = self.generate_with_metrics(prompts, **sampling)
        return [result.text for result in results] if isinstance(results, list) else results.text

    def generate_with_metrics(self, prompts: Any, **sampling: Any) -> GenerationResult | list[GenerationResult]:
        """As generate; the results with what was measured."""
        single = isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable) or is_token_ids(prompts)
        several = [Prompt.of(prompt) for prompt in ([prompts] if single else prompts)]
        results = self._open().batch(several, Sampling.of(sampling))
        return results[0] if single else results

    def generate_stream(self, prompt: Any, **sampling: Any) -> TextStream:
        """As generate for one prompt; pieces of the text as they come, then `result`."""
        return TextStream(self._open().stream(Prompt.of(prompt), Sampling.of(sampling)))

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> str:
        """Answer a conversation: [{"role": "user", "content": ...}, ...], rendered by the model's template.

        The cache of the last conversation is kept: one that goes on with it is read from there on (`cached_tokens`).

        Raises: as generate; PowerQuantConfigError too if the model has no template or it refuses the messages
        """
        return self.chat_with_metrics(messages, **sampling).text

    def chat_with_metrics(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> GenerationResult:
        (result,) = self._open().batch([_conversation(messages)], Sampling.of(sampling))
        return result

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> TextStream:
        """As chat; pieces of the answer as they come, then `result`."""
        return TextStream(self._open().stream(_conversation(messages), Sampling.of(sampling)))

    def close(self) -> None:
        """Free the model; a server of the backend ends. More calls are refused."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.model!r}, backend={self.backend!r}{'' if self._backend else ', closed'})"

    def _open(self) -> Backend:
        if self._backend is None:
            raise PowerQuantError("this Engine is closed; make another with Engine.from_pretrained")
        return self._backend


def _backend(settings: Settings) -> Backend:
    if settings.source.backend == "sparse":
        from .sparse_backend import SparseBackend

        return SparseBackend(settings)
    if settings.source.backend == "vllm":
        from .vllm_backend import VllmBackend

        return VllmBackend(settings)
    from .transformers_backend import TransformersBackend

    return TransformersBackend(settings)


def _conversation(messages: Any) -> Prompt:
    fine = isinstance(messages, Sequence) and messages and not isinstance(messages, str)
    if not fine or not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in messages):
        raise PowerQuantConfigError(
            f'messages must be a list such as [{{"role": "user", "content": "Hello"}}], not empty, got {messages!r:.200}'
        )
    try:
        json.dumps(list(messages), ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError as error:
        raise PowerQuantConfigError(
            f"messages must be text that UTF-8 can hold, got {error.object[error.start : error.end]!r} in them"
        ) from None
    return Prompt(messages=list(messages))
