# SPDX-License-Identifier: Apache-2.0
"""What one round of a kernel's interior loop costs, counted in its machine code.

The interior loop is the innermost loop that holds tensor-core products (HMMA); of several the one
with the most, of equal ones the cheapest: tiles under a mask may have a loop of their own.
Innermost is a loop none of whose loops holds products.

A round is a way from the loop's head back to it. The one that is counted does, in this order of
importance, the most products, the most asynchronous copies (LDGSTS), and has the fewest
instructions. So tiles that a warp skips, the last tile, which loads nothing behind it, tensors that
are not aligned and masks that a tile does not need are left out, and nothing else is.

Loops within a round that hold no products count once, and their number is told: how often they run
is not in the code. So are calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)(?:\s+([^;]*?))?\s*;", re.M)
JUMPS = ("BRA", "JMP", "CALL")  # ptxas also leaves loops by calls that never return
ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")
LOADS = ("LDS", "LDSM")


@dataclass(frozen=True)
class Loop:
    """A round of the interior loop: instructions by what they are."""

    instructions: int
    products: int
    loads: int  # from shared memory, matrix loads included
    copies: int
    inner: int  # loops and calls within it, which count once

    @property
    def per_product(self) -> float:
        return self.instructions / self.products

    @property
    def loads_per_product(self) -> float:
        return self.loads / self.products


@dataclass
class Block:
    """Instructions that run one after the other, and where they lead."""

    names: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def count(self, *names: str) -> int:
        return sum(name.split(".")[0] in names for name in self.names)


def _target(operands: str) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)


def blocks_of(code: str) -> list[Block]:
    """The flow graph of a listing; block 0 is the entry."""
    lines = [(int(at, 16), guard, name, rest or "") for at, guard, name, rest in LINE.findall(code)]
    met: dict[str, int] = {}  # where a barrier register's threads meet
    jumps: dict[int, int] = {}
    for at, _, name, rest in lines:
        base = name.split(".")[0]
        if base == "BSSY":
            met[rest.split(",")[0]] = _target(rest)
        elif base == "BSYNC" and rest in met:
            jumps[at] = met[rest]
        elif base in JUMPS:
            jumps[at] = _target(rest)
    starts = {at for at, *_ in lines[:1]} | set(jumps.values())
    for (_, _, name, _), (following, *_) in pairwise(lines):
        if name.split(".")[0] in (*JUMPS, "BSYNC", *ENDS):
            starts.add(following)
    number = {at: n for n, at in enumerate(sorted(starts))}
    blocks = [Block() for _ in number]
    here = 0
    for i, (at, guard, name, rest) in enumerate(lines):
        here = number.get(at, here)
        block = blocks[here]
        if name != "NOP":  # what is never done (@!PT) keeps others apart in time: no load
            block.names.append(f"NEVER.{name}" if guard == "!PT" else name)
        following = lines[i + 1][0] if i + 1 < len(lines) else None
        if following not in number:
            continue
        base = name.split(".")[0]
        # taken by all who come, and for good
        whole = guard == "" and base != "CALL" and not (base == "BRA" and "," in rest)
        if at in jumps and jumps[at] in number:
            block.next.append(number[jumps[at]])
        if not (whole and (at in jumps or base in ENDS)):
            block.next.append(number[following])
    if lines and lines[-1][0] in jumps:
        blocks[here].next.append(number[jumps[lines[-1][0]]])
    return blocks


def _order(blocks: list[Block]) -> list[int]:
    """Reachable blocks, each before what it leads to but for loops."""
    seen, done = {0}, []
    stack = [(0, iter(blocks[0].next))]
    while stack:
        at, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(blocks[following].next)))
                break
        else:
            done.append(at)
            stack.pop()
    return done[::-1]


def _dominators(blocks: list[Block], order: list[int]) -> dict[int, int]:
    """The closest block through which every way to a block goes."""
    rank = {b: i for i, b in enumerate(order)}
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for following in blocks[b].next:
            before[following].append(b)
    above = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            found = None
            for other in before[b]:
                if other not in above:
                    continue
                one = other
                while found is not None and one != found:
                    if rank[one] > rank[found]:
                        one = above[one]
                    else:
                        found = above[found]
                found = one
            if found is not None and above.get(b) != found:
                above[b] = found
                changed = True
    return above


def loops_of(blocks: list[Block]) -> dict[int, set[int]]:
    """Head -> blocks of every loop."""
    order = _order(blocks)
    above = _dominators(blocks, order)
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for following in blocks[b].next:
            before[following].append(b)

    def dominates(head: int, b: int) -> bool:
        while b != head and above[b] != b:
            b = above[b]
        return b == head

    loops: dict[int, set[int]] = {}
    for b in order:
        for head in blocks[b].next:
            if not dominates(head, b):
                continue
            body, todo = loops.setdefault(head, {head}), [b]
            while todo:
                at = todo.pop()
                if at not in body:
                    body.add(at)
                    todo += before[at]
    return loops


def _calls(blocks: list[Block], at: int) -> bool:
    """Whether a block ends with a call that returns."""
    if not blocks[at].count("CALL"):
        return False
    seen, todo = set(), [blocks[at].next[0]]
    while todo:
        b = todo.pop()
        if b in seen:
            continue
        seen.add(b)
        if blocks[b].count("RET"):
            return True
        todo += blocks[b].next[1:] if blocks[b].count("CALL") else blocks[b].next
    return False


def _round(blocks: list[Block], order: Iterable[int], head: int, body: set[int],
           inner: dict[int, set[int]]) -> Loop:  # fmt: skip
    """The round that is counted, of the loop `head`, `body` with its loops."""
    best: dict[int, tuple[int, int, int]] = {}  # products, copies, less instructions, up to a block
    way: dict[int, int] = {}
    rank = {b: i for i, b in enumerate(order)}
    ends = []
    for b in (b for b in order if b in body):
        block = blocks[b]
        own = (block.count("HMMA"), block.count("LDGSTS"), -len(block.names))
        so_far = best.get(b, (0, 0, 0))
        best[b] = (so_far[0] + own[0], so_far[1] + own[1], so_far[2] + own[2])
        for following in block.next:
            if following == head:
                ends.append(b)
                continue
            if following not in body or rank[following] <= rank[b]:
                continue
            if following not in way or best[b] > best[way[following]]:
                way[following], best[following] = b, best[b]
    at = max(ends, key=lambda b: best[b])
    path = [at]
    while path[-1] != head:
        path.append(way[path[-1]])
    on = [blocks[b] for b in path]
    return Loop(
        sum(len(b.names) for b in on),
        sum(b.count("HMMA") for b in on),
        sum(b.count(*LOADS) for b in on),
        sum(b.count("LDGSTS") for b in on),
        sum(h in path for h in inner) + sum(_calls(blocks, b) for b in path),
    )


def interior_loop(code: str) -> Loop | None:
    """Of a kernel's listing by cuobjdump; None without a loop of products."""
    if "HMMA" not in code:
        return None
    blocks = blocks_of(code)
    order = _order(blocks)
    loops = loops_of(blocks)
    holding = {h for h, body in loops.items() if any(blocks[b].count("HMMA") for b in body)}
    rounds = []
    for head in holding:
        body = loops[head]
        inner = {h: loops[h] for h in loops if h != head and h in body}
        if not holding & inner.keys():
            rounds.append(_round(blocks, order, head, body, inner))
    return min(rounds, key=lambda r: (-r.products, r.instructions), default=None)
