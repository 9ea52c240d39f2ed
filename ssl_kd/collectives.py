"""What the devices exchange in a compiled program, read from its text: nothing in the code says it, XLA decides."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One array of a collective; one collective may exchange several.

    Attributes:
      kind: of KINDS; asynchronous forms count as their kind.
      dtype, shape: of all that an all-gather returns, else of what every device puts in.
      times: how often one run of the program does it: more than once in a loop.
      source: path of the operation that made the array, as jax names it: 'jit(f)/jvp(student.embed)/…/reduce_sum'.
      collective: its name.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int
    source: str
    collective: str

    @property
    def bytes(self) -> int:
        """Of all times together, on one device."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return self.times * math.prod(self.shape) * bits // 8

    @property
    def network(self) -> str | None:
        """The network in whose forward or backward pass it is."""
        found = re.search(r"jvp\((\w+)\.\w+\)", self.source)
        return found and found[1]

    @property
    def backward(self) -> bool:
        """Whether it is in a backward pass."""
        return "transpose(jvp(" in self.source


def totals(exchanges: Iterable[Exchange]) -> dict[str, tuple[int, int]]:
    """Kind → collectives of one run, and their bytes on one device."""
    times: dict[str, dict[str, int]] = {}
    size: dict[str, int] = {}
    for e in exchanges:
        times.setdefault(e.kind, {})[e.collective] = e.times
        size[e.kind] = size.get(e.kind, 0) + e.bytes
    return {kind: (sum(times[kind].values()), size[kind]) for kind in KINDS if kind in size}


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(([^)]*)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|\w+_computation)=%?([\w.-]+)|\bbranch_computations=\{([^}]*)\}")
_LENGTH = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TRAITS = re.compile(r'\b(?:channel_id|replica_groups|source_target_pairs|op_name)=(?:"[^"]*"|[^\s"]+)')


def exchanges(text: str) -> list[Exchange]:
    """All that the devices exchange in one run of a program; of a conditional, in every branch.

    Args:
      text: of the compiled program, by `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: for a loop that exchanges something, if the text does not say how long it is.
    """
    computations: dict[str, dict[str, str]] = {}
    entry = ""
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            inside = computations[begun[2]] = {}
            entry = begun[2] if begun[1] else entry
        elif computations and (found := _INSTRUCTION.match(line)):
            inside[found[1]] = found[2]

    @functools.cache
    def of(computation: str) -> list[tuple[str, tuple[str, ...], list[Exchange]]]:
        """Of every collective: the computation that has it, what it shares with its like, and what it exchanges."""
        here, all_found = computations[computation], []
        for name, instruction in here.items():
            if collective := _COLLECTIVE.search(instruction.partition(", metadata=")[0]):
                traits = (collective[1], *_TRAITS.findall(instruction))
                all_found.append((computation, traits, _arrays(name, collective, here)))
                continue
            called = [one or _NAME.findall(several) for one, several in _CALLED.findall(instruction)]
            inner = [c for other in called for one in ([other] if isinstance(other, str) else other) for c in of(one)]
            times = 1
            if inner and " while(" in instruction:
                length = _LENGTH.search(instruction)
                if length is None:
                    raise ValueError(f"the loop {name} exchanges arrays, and the text does not say how often")
                times = int(length[1])
            for where, traits, arrays in inner:
                all_found.append((where, traits, [dataclasses.replace(e, times=times * e.times) for e in arrays]))
        return all_found

    # A TPU spreads a collective over the computations that it runs beside: in each of them all but its name is there.
    first: dict[tuple[str, ...], str] = {}
    return [e for where, traits, arrays in of(entry) for e in arrays if first.setdefault(traits, where) == where]


def _arrays(name: str, collective: re.Match[str], here: Mapping[str, str]) -> list[Exchange]:
    """What the collective of that name exchanges, a match in its text, one of a computation's instructions `here`."""
    instruction, kind, operands = here[name], collective[1], _NAME.findall(collective[2])
    own_source = _SOURCE.search(instruction)
    if kind == "all-gather":  # the results come last: an asynchronous one returns what is put in as well
        arrays = _ARRAY.findall(instruction[: collective.start()])[-len(operands) :]
    else:
        arrays = [_ARRAY.findall(here[operand])[0] for operand in operands]
    found = []
    for operand, (dtype, shape) in zip(operands, arrays, strict=True):
        source = _SOURCE.search(here[operand]) or own_source
        found.append(
            Exchange(
                kind=kind,
                dtype=dtype,
                shape=tuple(int(length) for length in shape.split(",") if length),
                times=1,
                source=source[1] if source else "",
                collective=name,
            )
        )
    return found
