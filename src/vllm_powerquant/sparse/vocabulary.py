"""A checkpoint's tokenizer as GGUF's tokenizer entries: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

GGUF has no place for what an added token does to the space beside it (lstrip, rstrip, single_word), nor for NFC.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from .checkpoint import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how the text is split before the merges: (type, what tells it from others of its type) of each step -> GGUF's name
_SPLITTERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Split", _GPT2_SPLIT), ("ByteLevel", False)): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Punctuation", "Contiguous"), ("ByteLevel", True), ("Digits", False), ("Split", "[0-9][0-9][0-9]")): "falcon",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)): "llama-bpe",
    (("Split", _WORDS + r"\p{N}" + _REST), ("ByteLevel", False)): "qwen2",
}


@dataclass
class Vocabulary:
    """Tokens by id, and what turns text into them."""

    model: str  # gpt2 or llama
    tokens: list[str]
    types: list[int]
    pre: str = "default"  # how text is split before the merges (gpt2)
    merges: list[str] = field(default_factory=list)  # gpt2
    scores: list[float] = field(default_factory=list)  # llama
    special_ids: dict[str, int] = field(default_factory=dict)  # GGUF's names: bos, eos, eot, unknown, padding
    flags: dict[str, bool] = field(default_factory=dict)  # add_bos_token, add_eos_token, add_space_prefix, ...
    chat_template: str | None = None

    def pad(self, size: int) -> None:
        """Fill up to the rows of the embedding with tokens that no text gives.

        Raises: PowerQuantConfigError if there are more tokens than rows
        """
        if len(self.tokens) > size:
            raise PowerQuantConfigError(f"the tokenizer has {len(self.tokens)} tokens, the model's vocab_size is {size}")
        for token_id in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{token_id}]")
            self.types.append(UNUSED)
            if self.model == "llama":
                self.scores.append(-1e6)

    def write(self, writer: Any) -> None:
        """Into a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        if self.model == "gpt2":
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token_id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    """From tokenizer.model, tokenizer.json, or vocab.json with merges.txt, in this order.

    Args:   config the checkpoint's config.json, for ids of special tokens that the tokenizer's files do not name
    Raises: PowerQuantConfigError if there is no tokenizer or its files contradict each other;
        PowerQuantUnsupportedError for a kind other than byte-level BPE and SentencePiece's BPE
    """
    try:
        return _read(folder, config)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise PowerQuantConfigError(f"the tokenizer in {folder} is malformed: {reason}") from error


def _read(folder: Path, config: dict[str, Any]) -> Vocabulary:
    options = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder, options)
    elif (folder / "tokenizer.json").is_file():
        vocabulary = _tokenizer_json(_read_json(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = _vocab_and_merges(folder, options)
    else:
        raise PowerQuantConfigError(
            f"{folder} has no tokenizer: tokenizer.model, tokenizer.json, or vocab.json and merges.txt"
        )
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(options.get(name), bool):
            vocabulary.flags[name] = options[name]
    vocabulary.special_ids |= _special_ids(folder, vocabulary.tokens, options, config)
    vocabulary.chat_template = _chat_template(folder, options)
    return vocabulary


def _read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def _tokenizer_json(tokenizer: dict[str, Any]) -> Vocabulary:
    model = tokenizer.get("model", {})
    pre = _splitter(tokenizer.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise PowerQuantUnsupportedError(
            f"no tokenizer.json of type {model.get('type')!r}{' with byte_fallback' if model.get('byte_fallback') else ''}; "
            "only byte-level BPE is read from it: for SentencePiece put tokenizer.model into the folder"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise PowerQuantUnsupportedError(f"no tokenizer.json with {name} = {model[name]!r}: the format's BPE has none")
    # readers know from the name llama-bpe alone that a word that is a token needs no merges
    if pre is not None and bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise PowerQuantUnsupportedError(
            f"no tokenizer.json of kind {pre} with ignore_merges = {model.get('ignore_merges')}"
        )
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "none")
    # NFC, which qwen2 asks for, changes no text that is composed already, as nearly all is
    if normalizer not in ("none", "NFC"):
        raise PowerQuantUnsupportedError(f"no tokenizer.json with the normalizer {normalizer!r}, only none or NFC")
    if pre is None:
        shape = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)[:300]
        known = ", ".join(sorted(set(_SPLITTERS.values())))
        raise PowerQuantUnsupportedError(f"no tokenizer.json with the pre_tokenizer {shape}; known are {known}")
    added = {entry["id"]: (entry["content"], bool(entry.get("special"))) for entry in tokenizer.get("added_tokens", [])}
    vocabulary = _byte_level(model["vocab"], added)
    vocabulary.pre = pre
    vocabulary.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary.flags = {"add_bos_token": False, "add_eos_token": False}
    processors = tokenizer.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        if processor.get("type") == "TemplateProcessing":
            vocabulary.flags = {
                "add_bos_token": "SpecialToken" in processor["single"][0],
                "add_eos_token": "SpecialToken" in processor["single"][-1],
            }
    vocabulary.flags["add_space_prefix"] = any(
        step.get("add_prefix_space", False)
        for step in _steps(tokenizer.get("pre_tokenizer"))
        if step.get("type") == "ByteLevel"
    )
    return vocabulary


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not pre_tokenizer:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _splitter(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """GGUF's name of a pre-tokenizer; None if it is none of those known."""
    shape = []
    for step in _steps(pre_tokenizer):
        detail: Any = None
        match step["type"]:
            case "ByteLevel":
                detail = step.get("use_regex", True)
            case "Digits":
                detail = step.get("individual_digits", False)
            case "Punctuation":
                detail = step.get("behavior")
            case "Split":
                detail = step["pattern"].get("Regex")
                if step.get("behavior") != "Isolated" or step.get("invert"):
                    return None
        shape.append((step["type"], detail))
    return _SPLITTERS.get(tuple(shape))


def _vocab_and_merges(folder: Path, options: dict[str, Any]) -> Vocabulary:
    """The files of GPT-2's own tokenizer, which OPT ships."""
    added = {token_id: (content, False) for content, token_id in _read_json(folder / "added_tokens.json").items()}
    for token_id, entry in options.get("added_tokens_decoder", {}).items():
        added[int(token_id)] = (entry["content"], bool(entry.get("special")))
    vocab = _read_json(folder / "vocab.json")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        content = _content(_read_json(folder / "special_tokens_map.json").get(name)) or _content(options.get(name))
        if content in vocab:
            added.setdefault(vocab[content], (content, True))
    vocabulary = _byte_level(vocab, added)
    vocabulary.pre = "gpt-2"
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    vocabulary.merges = [line for line in lines if line and not line.startswith("#version")]
    prefix = bool(options.get("add_prefix_space"))
    vocabulary.flags = {"add_bos_token": False, "add_eos_token": False, "add_space_prefix": prefix}
    return vocabulary


def _byte_level(vocab: dict[str, int], added: dict[int, tuple[str, bool]]) -> Vocabulary:
    """Args: vocab token -> id; added id -> (token, whether it is special)."""
    by_id = {token_id: token for token, token_id in vocab.items()} | {
        token_id: token for token_id, (token, _) in added.items()
    }
    if sorted(by_id) != list(range(len(by_id))):
        raise PowerQuantConfigError(f"the tokenizer's ids have gaps: {len(by_id)} tokens, the last id is {max(by_id)}")
    types = [NORMAL] * len(by_id)
    for token_id, (_, special) in added.items():
        types[token_id] = CONTROL if special else USER_DEFINED
    return Vocabulary("gpt2", [by_id[token_id] for token_id in range(len(by_id))], types)


def _sentencepiece(folder: Path, options: dict[str, Any]) -> Vocabulary:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise PowerQuantError(
            f"tokenizer.model needs {error.name or 'protobuf'}; run: pip install 'vllm-powerquant[sparse]'"
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString((folder / "tokenizer.model").read_bytes())
    except Exception as error:  # google.protobuf's DecodeError
        raise PowerQuantConfigError(f"{folder / 'tokenizer.model'} is no SentencePiece model: {error}") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise PowerQuantUnsupportedError(
            "no SentencePiece model of a type other than BPE: the format's tokenizer only merges"
        )
    if model.normalizer_spec.precompiled_charsmap:
        raise PowerQuantUnsupportedError(
            f"no SentencePiece model that normalizes its text (by {model.normalizer_spec.name}); only 'identity'"
        )
    # SentencePiece numbers its types as GGUF does
    vocabulary = Vocabulary(
        "llama",
        [piece.piece for piece in model.pieces],
        [piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        flags={
            "add_bos_token": True,
            "add_eos_token": False,
            "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
            "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        },
    )
    added = {token_id: (content, False) for content, token_id in _read_json(folder / "added_tokens.json").items()}
    for token_id, entry in options.get("added_tokens_decoder", {}).items():
        added[int(token_id)] = (entry["content"], bool(entry.get("special")))
    for token_id, (content, special) in sorted(added.items()):
        if token_id < len(vocabulary.tokens):
            if vocabulary.types[token_id] in (NORMAL, USER_DEFINED, UNUSED):
                vocabulary.tokens[token_id] = content
                vocabulary.types[token_id] = CONTROL if special else USER_DEFINED
            continue
        if token_id > len(vocabulary.tokens):
            raise PowerQuantConfigError(f"the tokenizer's ids have a gap before {token_id} ({content!r})")
        vocabulary.tokens.append(content)
        vocabulary.types.append(CONTROL if special else USER_DEFINED)
        vocabulary.scores.append(-1000.0)
    for name, token_id in (
        ("bos", model.trainer_spec.bos_id),
        ("eos", model.trainer_spec.eos_id),
        ("unknown", model.trainer_spec.unk_id),
        ("padding", model.trainer_spec.pad_id),
    ):
        if token_id >= 0:
            vocabulary.special_ids[name] = token_id
    return vocabulary


def _special_ids(folder: Path, tokens: list[str], options: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """By the tokenizer's own names first, then by the ids of config.json; a second end-of-text id becomes `eot`."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    named = _read_json(folder / "special_tokens_map.json")
    found = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        content = _content(options.get(f"{key}_token")) or _content(named.get(f"{key}_token"))
        configured = config.get(f"{key}_token_id")
        if content in ids:
            found[name] = ids[content]
        elif isinstance(configured, int) and 0 <= configured < len(tokens):
            found[name] = configured
    ends = _read_json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    for token_id in ends if isinstance(ends, list) else [ends]:
        if isinstance(token_id, int) and 0 <= token_id < len(tokens) and token_id != found.setdefault("eos", token_id):
            found.setdefault("eot", token_id)
    return found


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(folder: Path, options: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
