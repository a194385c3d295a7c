"""What a compiled program moves: bytes between chips and from and to memory.

Read from the compiler's own text (`compiled.as_text()`), which is the program
of one chip after partitioning, fusion and scheduling, so what is found is what
was built and not what was wished for. Loops are counted as often as they run:
their trip count is read from the counter, its bound and its step. Of a branch
the alternative that moves more is taken.

Between chips, a collective over groups of n chips, of an operand of B bytes a
chip, brings each chip

* all-gather (n - 1) B, reduce-scatter and all-to-all (n - 1) / n B,
* all-reduce 2 (n - 1) / n B,
* collective-permute B. Compilers build gathers and scatters of large layers as
  rings of these inside a loop over the parts, to hide them behind the product
  of the part that is there.

Bytes of memory are those of operands and results of what stands outside of
fusions, a slice of an array as the slice, an update in place as the update;
arrays that the compiler keeps in the chip's fast memory cost nothing. A custom
kernel counts each operand once, so less than one that reads it again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distilljax.typing import Number

_WIDTH = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2,
  "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
  "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
# Names of values, or steps in time: they move nothing.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast",
  "after-all", "partition-id", "replica-id", "opt-barrier", "domain",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "AssumeGather")
_SAME = ("copy", "bitcast", "convert", "reshape", "opt-barrier", "transpose")


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool


class Collective(NamedTuple):
  """Collectives of a kind over a set of mesh axes, all runs together.

  Attributes:
    kind: a name in `KINDS`.
    axes: mesh axes that its groups span, joined by "+".
    group: chips of a group.
    members: ids of the chips of its first group.
    count: how many run in a step.
    bytes: what they bring each chip in a step.
    ahead: part of `bytes` that goes to the chip before, of permutes: links
      have two directions.
    blocking: part of `bytes` that the schedule waits for: what is not started
      at one place and awaited at another.
  """

  kind: str
  axes: str
  group: int
  members: tuple[int, ...]
  count: float
  bytes: float
  ahead: float
  blocking: float


class Moved(NamedTuple):
  """What one chip moves in a step.

  Attributes:
    memory: bytes from and to its memory.
    collectives: bytes from other chips, by kind and axes.
    unknown_loops: loops of which no trip count was found, counted once.
  """

  memory: float
  collectives: tuple[Collective, ...]
  unknown_loops: tuple[str, ...]


def _closing(text: str, start: int) -> int:
  """Index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i + 1
  return len(text)


def _instruction(line: str) -> Instruction | None:
  head, equals, text = line.strip().partition(" = ")
  if not equals or not head.startswith(("%", "ROOT")):
    return None
  # Comments such as /*index=5*/ stand inside tuples.
  text = re.sub(r"/\*.*?\*/", "", text)
  end = _closing(text, 0) if text[0] == "(" else text.find(" ")
  shape, text = text[:end], text[end:].lstrip()
  opened = text.find("(")
  closed = _closing(text, opened)
  return Instruction(
    head.split("%")[-1],
    shape,
    text[:opened],
    tuple(re.findall(r"%([\w.\-]+)", text[opened:closed])),
    text[opened:],
    head.startswith("ROOT"),
  )


def _arrays(shape: str, everywhere: bool = False) -> list[Number]:
  """Bytes of the arrays of a shape that lie in the chip's main memory."""
  out = []
  for kind, dims, layout in _ARRAY.findall(shape):
    fast = re.search(r"S\([1-9]", layout)
    width = _WIDTH.get(kind, 1 if kind.startswith("f8") else 0)
    size = math.prod(int(n.strip("<=")) for n in dims.split(",") if n)
    out.append(0 if fast and not everywhere else width * size)
  return out


def _bytes(shape: str, everywhere: bool = False) -> Number:
  return sum(_arrays(shape, everywhere))


def _called(instruction: Instruction, key: str) -> str | None:
  found = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.rest)
  return found.group(1) if found else None


def groups(rest: str) -> np.ndarray | None:
  """Groups of a collective from its attributes, None for all chips.

  Args:
    rest: such as "replica_groups=[2,8]<=[16]".

  Returns:
    Ids of chips, shape [groups, chips of a group]; of a collective-permute
    [pairs, 2].
  """
  listed = re.search(
    r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest
  )
  if listed:
    inner = re.findall(r"\{([\d, ]+)\}", listed.group(1))
    return np.array([[int(n) for n in g.split(",")] for g in inner])
  if "replica_groups=mesh[" in rest:
    return _mesh_groups(rest)
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
  )
  if not iota:
    return None
  shape, source, order = (
    [int(n) for n in g.split(",")] if g else None for g in iota.groups()
  )
  ids = np.arange(math.prod(source)).reshape(source)
  return (ids.transpose(order) if order else ids).reshape(shape)


def _mesh_groups(rest: str) -> np.ndarray:
  """Groups along some axes of a mesh of the compiler's own.

  Such as "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}".
  """
  sizes, given, axes = re.search(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}",
    rest,
  ).groups()
  mesh = {k: int(n) for k, n in re.findall(r"('[^']+')=(\d+)", sizes)}
  ids = np.arange(math.prod(mesh.values()))
  turned = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", given or "")
  if turned:
    source, order = (
      [int(n) for n in g.split(",")] if g else None for g in turned.groups()
    )
    ids = ids.reshape(source)
    ids = ids.transpose(order) if order else ids
  elif given:
    ids = np.array([int(n) for n in re.findall(r"\d+", given)])
  ids = ids.reshape(tuple(mesh.values()))
  along = [i for i, name in enumerate(mesh) if name in axes]
  others = [i for i in range(len(mesh)) if i not in along]
  size = math.prod(ids.shape[i] for i in along)
  return ids.transpose(others + along).reshape(-1, size)


def _axes(members: np.ndarray, mesh: Mapping[str, int]) -> str:
  """Mesh axes along which the chips of each group differ."""
  places = np.unravel_index(members, tuple(mesh.values()))
  names = [
    name
    for name, place in zip(mesh, places)
    if np.any(place != place[:, :1])
  ]
  return "+".join(names) or "none"


class _Program:
  """A parsed module, and what its computations move."""

  def __init__(self, text: str, mesh: Mapping[str, int]):
    self.mesh = mesh
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    self.unknown: list[str] = []
    self._done: dict[str, tuple[float, dict]] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      if line and line[0] not in " }":
        opened = re.match(r"(ENTRY )?%?([\w.\-]+)[ (].*\{\s*$", line)
        if opened and not line.startswith("HloModule"):
          current = self.computations.setdefault(opened.group(2), {})
          if opened.group(1):
            self.entry = opened.group(2)
      elif instruction := _instruction(line):
        current[instruction.name] = instruction

  def root(self, computation: str) -> Instruction | None:
    lines = self.computations.get(computation, {}).values()
    return next((i for i in lines if i.root), None)

  # --- loops -------------------------------------------------------------

  def _source(self, lines, name):
    """The instruction that a value is a copy of."""
    found = lines.get(name)
    while found is not None and found.opcode in _SAME and found.operands:
      found = lines.get(found.operands[0])
    return found

  def _inside(self, lines, instruction, opcode):
    """(instruction of that opcode, sources of its operands) of a value.

    Looks through a fusion, whose parameters stand for its operands.
    """
    while instruction is not None and instruction.opcode in ("fusion", "call"):
      inner = self.computations.get(
        _called(instruction, "calls") or _called(instruction, "to_apply"), {}
      )
      root = next((i for i in inner.values() if i.root), None)
      if root is None or root.opcode != opcode:
        return None
      sources = []
      for name in root.operands:
        source = self._source(inner, name)
        if source is not None and source.opcode == "parameter":
          number = int(re.match(r"\((\d+)\)", source.rest).group(1))
          source = self._source(lines, instruction.operands[number])
        sources.append(source)
      return root, sources
    if instruction is None or instruction.opcode != opcode:
      return None
    return instruction, [self._source(lines, n) for n in instruction.operands]

  @staticmethod
  def _constant(source) -> int | None:
    if source is None or source.opcode != "constant":
      return None
    found = re.match(r"\((-?\d+)\)", source.rest)
    return int(found.group(1)) if found else None

  @staticmethod
  def _index(source) -> int | None:
    if source is None or source.opcode != "get-tuple-element":
      return None
    return int(re.search(r"index=(\d+)", source.rest).group(1))

  def trips(self, lines, loop: Instruction) -> int | None:
    """How often a while runs, None where it cannot be told."""
    known = re.search(r'known_trip_count\W+n\W+(\d+)', loop.rest)
    if known:
      return int(known.group(1))
    condition = self.computations.get(_called(loop, "condition"), {})
    found = self._inside(
      condition, next((i for i in condition.values() if i.root), None),
      "compare",
    )  # fmt: skip
    if found is None:
      return None
    compare, (counter, limit) = found
    strict = re.search(r"direction=(L[TE])", compare.rest)
    number, end = self._index(counter), self._constant(limit)
    start = lines.get(loop.operands[0])
    begins = (
      start.operands if start is not None and start.opcode == "tuple" else ()
    )
    value = lambda i: self._constant(self._source(lines, begins[i]))
    if end is None and (j := self._index(limit)) is not None and begins:
      end = value(j)
    if strict is None or number is None or end is None:
      return None
    begin = value(number) if begins else 0
    body = self.computations.get(_called(loop, "body"), {})
    root = next((i for i in body.values() if i.root), None)
    step = 1
    if root is not None and root.opcode == "tuple":
      moved = self._inside(
        body, self._source(body, root.operands[number]), "add"
      )
      steps = [self._constant(s) for s in moved[1]] if moved else []
      step = next((s for s in steps if s), 1)
    end += strict.group(1) == "LE"
    return max(0, -(-(end - (begin or 0)) // step))

  # --- memory ------------------------------------------------------------

  def _read(self, computation: str, number: int, whole: Number) -> Number:
    """Bytes that a fusion reads of its parameter `number`."""
    lines = self.computations.get(computation, {})
    own = [
      i.name
      for i in lines.values()
      if i.opcode == "parameter" and i.rest.startswith(f"({number})")
    ]
    total, queue = 0.0, list(own)
    while queue:
      name = queue.pop()
      for user in lines.values():
        if name not in user.operands:
          continue
        if user.opcode == "bitcast":
          queue.append(user.name)
        elif user.opcode in ("dynamic-slice", "slice"):
          total += _bytes(user.shape, everywhere=True)
        elif user.opcode == "dynamic-update-slice":
          # Its own place is written, not read.
          total += whole if user.operands[0] != name else 0
        elif user.opcode == "fusion":
          inner = _called(user, "calls")
          total += self._read(inner, user.operands.index(name), whole)
        else:
          return whole
    return min(total, whole)

  def _written(self, computation: str, shape: str) -> Number:
    """Bytes that a fusion writes."""
    lines = self.computations.get(computation, {})
    root = self.root(computation)
    if root is None:
      return _bytes(shape)
    if root.opcode != "tuple":
      return self._update(lines, root, _bytes(shape))
    parts = zip(root.operands, _arrays(shape))
    return sum(self._update(lines, lines.get(n), size) for n, size in parts)

  def _update(self, lines, root, whole: Number) -> Number:
    while root is not None and root.opcode == "bitcast":
      root = lines.get(root.operands[0])
    if not whole or root is None:
      return whole
    if root.opcode == "dynamic-update-slice":
      update = lines.get(root.operands[1])
      return min(whole, _bytes(update.shape, everywhere=True))
    if root.opcode == "fusion":
      return min(whole, self._written(_called(root, "calls"), root.shape))
    return whole

  def _memory(self, lines, instruction: Instruction) -> Number:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0.0
    if opcode == "custom-call" and any(
      f'"{name}' in instruction.rest for name in _FREE_CALLS
    ):
      return 0.0
    result = _bytes(instruction.shape)
    operands = [lines[n] for n in instruction.operands if n in lines]
    if opcode.endswith("-start"):
      if opcode == "slice-start":
        whole = _arrays(instruction.shape, everywhere=True)
        part = min((size for size in whole[:-1] if size), default=0.0)
        return part * sum(
          size > 0 for size in _arrays(instruction.shape)[:2]
        )
      return result
    if opcode in ("dynamic-slice", "slice"):
      return 2 * result
    if opcode == "dynamic-update-slice":
      return 2 * _bytes(operands[1].shape) if len(operands) > 1 else result
    if opcode == "fusion":
      inner = _called(instruction, "calls")
      read = 0.0
      for number, name in enumerate(instruction.operands):
        size = _bytes(lines[name].shape) if name in lines else 0.0
        read += self._read(inner, number, size) if size else 0.0
      return read + self._written(inner, instruction.shape)
    return result + sum(_bytes(o.shape) for o in operands)

  # --- collectives -------------------------------------------------------

  def _collective(self, computation, lines, instruction):
    """(key, count, bytes, ahead, blocking) of a collective, or None."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
      return None
    size = sum(
      _bytes(lines[n].shape, everywhere=True)
      for n in instruction.operands
      if n in lines
    )
    members = groups(instruction.rest)
    chips = math.prod(self.mesh.values())
    if members is None or members.size == 0:
      members = np.arange(chips)[None]
    axes = _axes(members, self.mesh)
    n = members.shape[1]
    kind = opcode
    if opcode == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    moved = {
      "all-gather": (n - 1) * size,
      "all-reduce": 2 * (n - 1) / n * size,
      "reduce-scatter": (n - 1) / n * size,
      "all-to-all": (n - 1) / n * size,
    }.get(kind, size)
    ahead = 0.0
    if kind == "collective-permute":
      # The ring that the pairs are made of, and which way it is gone.
      steps = members[:, 1] - members[:, 0]
      ahead = moved if np.sum(steps < 0) > np.sum(steps > 0) else 0.0
      extent = [self.mesh[a] for a in axes.split("+") if a in self.mesh]
      n = math.prod(extent)
    first = tuple(int(i) for i in members[0])
    waits = 0.0 if instruction.opcode.endswith("-start") else moved
    return (kind, axes, n, first), 1.0, moved, ahead, waits

  # --- all ---------------------------------------------------------------

  def moved(self, computation: str) -> tuple[Number, dict]:
    """Bytes of memory and {collective: its numbers} of one run."""
    if computation in self._done:
      return self._done[computation]
    lines = self.computations.get(computation, {})
    memory, found = 0.0, {}

    def add(part, times=1.0):
      nonlocal memory
      memory += times * part[0]
      for key, values in part[1].items():
        old = found.get(key, (0.0,) * len(values))
        found[key] = tuple(o + times * v for o, v in zip(old, values))

    for instruction in lines.values():
      opcode = instruction.opcode
      if opcode == "while":
        trips = self.trips(lines, instruction)
        if trips is None:
          self.unknown.append(instruction.name)
          trips = 1
        add(self.moved(_called(instruction, "body")), trips)
      elif opcode == "conditional":
        branches = re.findall(
          r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest
        )
        listed = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)
        if listed:
          branches = re.findall(r"%([\w.\-]+)", listed.group(1))
        parts = [self.moved(b) for b in branches]
        if parts:
          weight = lambda p: p[0] + sum(v[1] for v in p[1].values())
          add(max(parts, key=weight))
      elif opcode in ("call", "async-start"):
        inner = _called(instruction, "to_apply")
        part = self.moved(inner or _called(instruction, "calls"))
        if opcode == "async-start":
          part = part[0], {k: (*v[:-1], 0.0) for k, v in part[1].items()}
        add(part)
      else:
        if opcode == "fusion":
          # What is inside touches no memory of its own, but may be sent.
          add((0.0, self.moved(_called(instruction, "calls"))[1]))
        one = self._collective(computation, lines, instruction)
        if one is not None:
          add((0.0, {one[0]: one[1:]}))
        add((self._memory(lines, instruction), {}))
    self._done[computation] = memory, found
    return memory, found


def read(text: str, mesh: Mapping[str, int]) -> Moved:
  """What one run of a compiled program moves, on each chip.

  Args:
    text: `compiled.as_text()`.
    mesh: sizes of the axes of the mesh that it was compiled for, in order
      (`mesh.shape`).

  Returns:
    Bytes of memory and collectives.
  """
  program = _Program(text, mesh)
  memory, found = program.moved(program.entry)
  merged: dict[tuple[str, str, int], Collective] = {}
  for (kind, axes, n, members), values in found.items():
    key = (kind, axes, n)
    old = merged.get(key) or Collective(*key, members, 0.0, 0.0, 0.0, 0.0)
    merged[key] = Collective(
      *old[:4], *(o + v for o, v in zip(old[4:], values))
    )
  rows = sorted(merged.values(), key=lambda c: -c.bytes)
  return Moved(memory, tuple(rows), tuple(program.unknown))


def total(collectives: Sequence[Collective]) -> Number:
  """Bytes that all of them bring a chip."""
  return sum(c.bytes for c in collectives)
