"""The checkpoint that `relufy` writes: the original's files with changed weights and hidden_act "relu"."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from ..errors import PowerQuantError
from ..files import umask
from .checkpoint import Checkpoint
from .deltas import Deltas

COPIED = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*")
COPIED += ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write_checkpoint(checkpoint: Checkpoint, deltas: Deltas, output: Path, origin: str) -> None:
    """The original's files, weights changed file by file, config.json last; whole or not at all.

    Raises: PowerQuantError if it can't be written
    """
    from safetensors.torch import save_file

    folder = checkpoint.folder
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for name in checkpoint.shards:
            tensors = {key: deltas.merged(key, tensor) for key, tensor in checkpoint.load_shard(name).items()}
            save_file(tensors, unfinished / name, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        for path in (*(found for pattern in COPIED for found in sorted(folder.glob(pattern))), index):
            if path.is_file():
                shutil.copyfile(path, unfinished / path.name)
        (unfinished / "README.md").write_text(_readme(folder, origin), encoding="utf-8")
        config = {**checkpoint.config, "hidden_act": "relu"}
        (unfinished / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        mask = umask()
        for path in unfinished.iterdir():
            path.chmod(0o666 & ~mask)
        unfinished.chmod(0o777 & ~mask)
        if not output.is_dir():
            unfinished.rename(output)
            return
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(output / path.name)
    except OSError as error:
        raise PowerQuantError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _readme(folder: Path, origin: str) -> str:
    licence = next((path.name for path in sorted(folder.glob("LICEN[SC]E*"))), None)
    told = (
        f"# {Path(origin).name} with ReLU\n\n"
        f"Made by vllm-powerquant (`powerquant relufy`) from the checkpoint `{Path(origin).name}`: ReLU in place of SiLU, "
        "and low-rank changes of the layers' matrices and norms, trained to predict what the original predicts. Everything "
        "else, the tokenizer included, is the original's.\n\n"
        f"Licence: the original's{f', in {licence}' if licence else ''}.\n"
    )
    original = folder / "README.md"
    if original.is_file():
        told += f"\n## The original's README\n\n{original.read_text(encoding='utf-8', errors='replace')}"
    return told
