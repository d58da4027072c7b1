# SPDX-License-Identifier: Apache-2.0
"""What AXI demands of the wires between the kernel and its surroundings, checked cycle by cycle.

Both sides of a link are held to the rules. Nothing here depends on a simulator: `AxiRules.step` is
given the wires of one cycle, as they are just before a rising edge of the clock. The benches of
`bench_kernel` call it in every cycle.

# Ref: ARM IHI 0022 (AXI and ACE), the section named beside each rule
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from nearkv_hw import abi

_INCR, _OKAY, _EXOKAY = 1, 0, 1
_ADDRESS = ("addr", "len", "size", "burst", "id")
FULL = {
    "ar": _ADDRESS,
    "r": ("id", "data", "resp", "last"),
    "aw": _ADDRESS,
    "w": ("data", "strb", "last"),
    "b": ("id", "resp"),
}
LITE = {
    "ar": ("addr",),
    "r": ("data", "resp"),
    "aw": ("addr",),
    "w": ("data", "strb"),
    "b": ("resp",),
}


class Rule(Enum):
    """Each rule in words, with its source."""

    RESET = "valid must be low in reset and until the first edge after it (A3.1.2)"
    HOLD_VALID = "valid must stay until ready (A3.2.1)"
    HOLD_PAYLOAD = "the payload must stay until ready (A3.2.1)"
    LENGTH = "a burst is longer than this port announces (A3.4.1)"
    SIZE = "beats must be full width (A3.4.1; SUPPORTS_NARROW_BURST=0)"
    TYPE = "bursts must be INCR (A3.4.1)"
    ID = "a port has one ID (A5.1)"
    ALIGNED = "a burst must begin at a whole beat"
    BOUNDARY = "a burst must not cross 4096 bytes (A3.4.1)"
    OUTSTANDING = "more bursts under way than this port announces (A5.3)"
    WLAST = "WLAST must be high with the last beat of a burst, and only then (A3.4.1)"
    STROBES = "every byte of a beat must be written"
    EARLY_B = "a write must be answered after its address and its last beat (A3.3.1)"
    EARLY_R = "read data must come after its address was taken (A3.3.1)"
    RLAST = "RLAST must be high with the last beat of a burst, and only then (A3.4.1)"
    RESPONSE_ID = "a response must carry the ID of its burst (A5.3)"
    RESPONSE = "EXOKAY answers exclusive accesses only; a register is answered OKAY (A3.4.4)"
    UNANSWERED = "everything asked for must be answered before the end (A3.4.4)"


class Violation(AssertionError):
    """A rule was broken. `rule` says which."""

    def __init__(self, rule: Rule, where: str, cycle: int, detail: str = ""):
        super().__init__(f"{where}, cycle {cycle}: {rule.value}{detail and '; ' + detail}")
        self.rule = rule


@dataclass(frozen=True)
class Limits:
    """What a port announces: beats of its longest burst, bursts under way at once."""

    beats: int = 1
    bursts: int = 1


class AxiRules:
    """The rules of one interface.

    Parameters
    ----------
    name : str
        Prefix of its wires, for messages.
    channels : dict
        Which channels it has and their fields: a part of `FULL`, or `LITE`.
    reads, writes : Limits
    """

    def __init__(self, name: str, channels: dict, reads=Limits(), writes=Limits()):
        self.name, self.cycle = name, 0
        self._channels, self._limits = channels, {"ar": reads, "aw": writes}
        self._full = "len" in channels["ar"]
        self.bursts: dict[str, int] = dict.fromkeys(("ar", "aw"), 0)
        self._forget()
        self._released = False

    def _forget(self):
        self._held = {}  # channel -> payload that waits for ready
        self._reads = deque()  # [id, beats to come]
        self._writes = deque()  # [id, beats to come] whose address was taken
        self._ahead = deque()  # last flags of data that came before its address
        self._answers = deque()  # IDs of complete writes

    def step(self, reset_n: int, read: Callable[[str], int]) -> None:
        """Check one cycle.

        Parameters
        ----------
        reset_n : int
            The reset wire, active low.
        read : function
            The value of a wire, by its name without the prefix (`"arvalid"`). Called only for what
            is needed: a payload while it is valid.

        Raises
        ------
        Violation
        """
        self.cycle += 1
        if not (reset_n and self._released):
            for channel in self._channels:
                if read(channel + "valid"):
                    raise self._violation(Rule.RESET, channel)
            self._forget()
            self._released = bool(reset_n)
            return
        taken = {}
        for channel in self._channels:
            payload = self._handshake(channel, read)
            if payload is not None:
                taken[channel] = payload
        # Answers first: what is asked for in this cycle cannot be answered in it.
        for channel in ("r", "b", "ar", "aw", "w"):
            if channel in taken:
                getattr(self, "_take_" + channel)(taken[channel])
        while self._writes and self._ahead:
            self._match()

    def finish(self) -> None:
        """Check that nothing is under way."""
        for channel, waits in (("r", self._reads), ("b", [*self._writes, *self._answers]),
                               ("w", self._ahead)):  # fmt: skip
            if waits:
                raise self._violation(Rule.UNANSWERED, channel, f"{len(waits)} under way")
        for channel in self._held:
            raise self._violation(Rule.UNANSWERED, channel)

    def _handshake(self, channel, read) -> dict | None:
        """The payload if it is taken in this cycle."""
        valid, ready = read(channel + "valid"), read(channel + "ready")
        held = self._held.pop(channel, None)
        if not valid:
            if held is not None:
                raise self._violation(Rule.HOLD_VALID, channel)
            return None
        # Data is wide and matters only while it waits.
        payload = {
            field: read(channel + field)
            for field in self._channels[channel]
            if field != "data" or held is not None or not ready
        }
        if held is not None and payload != held:
            changed = ", ".join(field for field in held if held[field] != payload[field])
            raise self._violation(Rule.HOLD_PAYLOAD, channel, f"changed: {changed}")
        if ready:
            return payload
        self._held[channel] = payload
        return None

    def _take_ar(self, burst):
        self._address("ar", burst, self._reads, len(self._reads))

    def _take_aw(self, burst):
        self._address("aw", burst, self._writes, len(self._writes) + len(self._answers))

    def _address(self, channel, burst, queue, under_way):
        limits = self._limits[channel]
        beats = burst.get("len", 0) + 1
        if self._full:
            at = burst["addr"]
            shown = f"{beats} beats at {at:#x}"
            for rule, broken in (
                (Rule.LENGTH, beats > limits.beats),
                (Rule.SIZE, 1 << burst["size"] != abi.BEAT_BYTES),
                (Rule.TYPE, burst["burst"] != _INCR),
                (Rule.ID, burst["id"] != 0),
                (Rule.ALIGNED, at % abi.BEAT_BYTES),
                (Rule.BOUNDARY, at % abi.BURST_BYTES + beats * abi.BEAT_BYTES > abi.BURST_BYTES),
            ):
                if broken:
                    raise self._violation(rule, channel, shown)
        if under_way >= limits.bursts:
            raise self._violation(Rule.OUTSTANDING, channel, f"limit {limits.bursts}")
        self.bursts[channel] += 1
        queue.append([burst.get("id", 0), beats])

    def _take_r(self, beat):
        if not self._reads:
            raise self._violation(Rule.EARLY_R, "r")
        head = self._reads[0]
        head[1] -= 1
        self._answer("r", beat, head[0])
        if beat.get("last", 1) != (head[1] == 0):
            raise self._violation(Rule.RLAST, "r", f"{head[1]} beats to come")
        if head[1] == 0:
            self._reads.popleft()

    def _take_w(self, beat):
        if self._full and beat["strb"] != (1 << abi.BEAT_BYTES) - 1:
            raise self._violation(Rule.STROBES, "w", f"{beat['strb']:#x}")
        self._ahead.append(beat.get("last", 1))

    def _match(self):
        head = self._writes[0]
        head[1] -= 1
        if self._ahead.popleft() != (head[1] == 0):
            raise self._violation(Rule.WLAST, "w", f"{head[1]} beats to come")
        if head[1] == 0:
            self._writes.popleft()
            self._answers.append(head[0])

    def _take_b(self, answer):
        if not self._answers:
            raise self._violation(Rule.EARLY_B, "b")
        self._answer("b", answer, self._answers.popleft())

    def _answer(self, channel, payload, identity):
        if payload.get("id", 0) != identity:
            raise self._violation(Rule.RESPONSE_ID, channel, f"{payload['id']}, not {identity}")
        if payload["resp"] == _EXOKAY or (not self._full and payload["resp"] != _OKAY):
            raise self._violation(Rule.RESPONSE, channel, f"response {payload['resp']}")

    def _violation(self, rule, channel, detail="") -> Violation:
        return Violation(rule, f"{self.name}.{channel}", self.cycle, detail)
