# SPDX-License-Identifier: Apache-2.0
"""Opening cards by name. What the name stands for is imported when it is asked for."""

from collections.abc import Callable, Sequence
import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Literal, overload

from ..io import JobMemory, KvMemory
from .card import Card
from .engines import Engines, engines_of
from .errors import CardError
from .executor import Simulated

log = logging.getLogger("nearkv")

DEFAULT_CARD = "twin"
KV_BYTES = 64 << 20
JOB_BYTES = 16 << 20


def _simulated(module: str, attribute: str, timeout_s: float) -> Callable[..., Card]:
    """The opener of a card that nearkv_sim imitates."""

    def opener(name, unit, *, config="smartssd", kv_bytes=KV_BYTES, job_bytes=JOB_BYTES,
               reads_in_flight=None, reader="auto", timeout_s=timeout_s, **options):  # fmt: skip
        if unit:
            raise CardError(f"card {name!r}: there is one of its kind, without a number")
        try:
            from nearkv_hw.config import Config, preset

            backend = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            package = (error.name or module).split(".")[0]
            raise CardError(
                f"card {name!r} needs the package {package}; install it with: pip install {package}"
            ) from error
        config = config if isinstance(config, Config) else preset(config)
        try:
            kv, job = KvMemory(kv_bytes), JobMemory(job_bytes)
        except (MemoryError, OSError, OverflowError) as error:
            raise CardError(
                f"card {name!r}: {kv_bytes} bytes of kv memory and {job_bytes} of job memory cannot be "
                f"allocated ({error}); choose a smaller kv_bytes"
            ) from error
        try:
            executor = Simulated(functools.partial(backend, config, **options))
        except RuntimeError as error:
            raise CardError(f"card {name!r} cannot be opened: {error}") from error
        try:
            return Card(
                name, kv, job, executor,
                reads_in_flight=reads_in_flight, reader=reader, timeout_s=timeout_s,
            )  # fmt: skip
        except BaseException:
            executor.close(timeout_s)
            raise

    return opener


def _module_of(name: str) -> ModuleType:
    """nearkv.cards.xrt or nearkv.cards.pynq. Raises CardError if what it needs is not installed."""
    family = name.partition(":")[0]
    try:
        return importlib.import_module(f".{family}", __package__)
    except ModuleNotFoundError as error:
        raise CardError(
            f"card {name!r} needs the package {error.name}; install it with: pip install 'nearkv[{family}]'"
        ) from error


def _xrt(name, unit, *, config=None, kv_bytes=KV_BYTES, job_bytes=JOB_BYTES, reads_in_flight=None,
         reader="auto", timeout_s=60.0, xclbin=None):  # fmt: skip
    """The opener of a card behind XRT, by itself or through PYNQ."""
    module = _module_of(name)
    executor = module.open_executor(
        name, unit,
        config=config, kv_bytes=kv_bytes, job_bytes=job_bytes, timeout_s=timeout_s, path=xclbin,
    )  # fmt: skip
    try:
        return Card(
            name, executor.kv, executor.job, executor,
            reads_in_flight=reads_in_flight, reader=reader, timeout_s=timeout_s,
            pci_address=executor.pci_address,
        )  # fmt: skip
    except BaseException:
        executor.close(timeout_s)
        raise


_MEMORY_OPTIONS = ("config", "kv_bytes", "job_bytes", "reads_in_flight", "reader", "timeout_s")
# family -> opener(name, unit, **options); "xrt:0" is unit "0" of family "xrt".
_FAMILIES: dict[str, Callable[..., Card]] = {
    "model": _simulated("nearkv_sim.model", "ModelCard", timeout_s=60.0),
    "twin": _simulated("nearkv_sim.twin", "TwinCard", timeout_s=60.0),
    "rtl": _simulated("nearkv_sim.rtl", "RtlCard", timeout_s=600.0),
    "xrt": _xrt,
    "pynq": _xrt,
}


def engine_names(name: str, xclbin: str | os.PathLike | None = None) -> list[str]:
    """What `open_card` opens one card each for, by a name: ["xrt:0/0", "xrt:0/1"] for "xrt:0".

    Parameters
    ----------
    name : str
        A card of one engine stands for itself alone, as does "xrt:0/1".
    xclbin : path, optional
        As for `open_card`. It says how many engines there are; XRT is not asked.

    Raises
    ------
    CardError
        As `open_card`, if the name or the xclbin is not what it must be.
    """
    family, _, unit = name.partition(":")
    if family not in _FAMILIES:
        known = ", ".join(repr(known) for known in _FAMILIES)
        raise CardError(f"no card {name!r}; there are {known}")
    if _FAMILIES[family] is not _xrt:
        return [name]
    n_engines = _module_of(name).count_engines(name, unit, xclbin)
    return [f"{name}/{engine}" for engine in range(n_engines)] if n_engines > 1 else [name]


@overload
def open_card(name: Literal["model", "twin", "rtl"] | None = None, **options) -> Card: ...
@overload
def open_card(name: str | None = None, **options) -> Card | Engines: ...
def open_card(name=None, **options):
    """Open a card. Use it as a context manager, or close it.

    Parameters
    ----------
    name : str, optional
        "model": the bit-exact model in numpy. "twin": the same bits, native and fast. "rtl": the
        emitted Verilog in Verilator. "xrt:0": the first card that XRT has, with nearkv's xclbin, and
        with all engines that the xclbin has; "xrt:0000:04:00.1": by its PCI address; "xrt:0/1": its
        second engine alone. "pynq:0", and so on: the same through PYNQ. Default: "twin", or "model"
        with a warning where the native part cannot be used.
    config : str or nearkv_hw.config.Config
        The build to imitate, "smartssd" by default; or that a card must be, by default any.
    kv_bytes, job_bytes : int
        Sizes of the card's memories; of each engine's.
    timeout_s : float
        How long a load or a run may take, unless it brings its own limit.
    **options
        Passed to the card's backend. Of a card behind XRT: xclbin, the path of its file; by default
        what NEARKV_XCLBIN names.

    Returns
    -------
    Card, or Engines if it has several

    Raises
    ------
    CardError
        If there is no such card (the message lists those there are), or a package is missing (the
        message gives the command that installs it).

    >>> with open_card("model") as card:
    ...     card.rows
    8
    """
    if name is None:
        try:
            return open_card(DEFAULT_CARD, **options)
        except CardError as error:
            log.warning("%s; going on with the card model, which is slow", error)
            options = {key: options[key] for key in options if key in _MEMORY_OPTIONS}
            return open_card("model", **options)
    names = engine_names(name, options.get("xclbin"))
    family, _, _ = name.partition(":")
    cards = (_FAMILIES[family](one, one.partition(":")[2], **options) for one in names)
    return next(cards) if names == [name] else Engines(name, cards)


def open_cards(
    card: "str | Card | Engines | Sequence[str | Card | Engines] | None" = None, **options
) -> tuple[list[Card], list[Card]]:
    """Open one card or several, sharing the processor's cores among those that are programs.

    Parameters
    ----------
    card : str, Card, Engines, or a sequence of them, optional
        Cards that are open already stay as they are. Default: as `open_card`.
    **options
        As for `open_card`; of every card that is opened.

    Returns
    -------
    cards : list of Card
        Of a card with several engines, each of them.
    opened : list of Card
        Those of them that this call opened, for the caller to close.

    Raises
    ------
    ValueError
        If there is no card among them.
    CardError
        As `open_card`; none stays open then.
    """
    wanted = list(card) if isinstance(card, Sequence) and not isinstance(card, str) else [card]
    if not wanted:
        raise ValueError("at least one card is needed")
    twins = wanted.count("twin")
    cards: list[Card] = []
    opened: list[Card] = []
    try:
        for one in wanted:
            if one is None or isinstance(one, str):
                more = dict(options)
                if twins > 1 and one == "twin":
                    cores = len(os.sched_getaffinity(0))
                    more.setdefault("threads", max(1, cores // twins))
                one = open_card(one, **more)
                opened += engines_of(one)
            cards += engines_of(one)
    except BaseException:
        for one in opened:
            one.close()
        raise
    return cards, opened
