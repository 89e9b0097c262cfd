# SPDX-License-Identifier: Apache-2.0
"""What can be changed in a C++ source, and the source with switches for chosen changes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokens import Source

INFIX = {
    "<": ("Less", "<="), "<=": ("AtMost", "<"), ">": ("More", ">="), ">=": ("AtLeast", ">"),
    "==": ("Equal", "!="), "!=": ("Unequal", "=="), "+": ("Add", "-"), "-": ("Subtract", "+"),
    "*": ("Multiply", "+"), "/": ("Divide", "*"), "%": ("Remainder", "/"),
}  # fmt: skip
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "%=", "|=", "&=", "^=", "<<=", ">>=")
BARRIERS = re.compile(r"(\w+(::|\.|->))*(sync_\w+|copy_async_(wait|commit)|wait|commit)\b")
# Words that begin no expression.
NO_STATEMENT = {
    "return", "if", "for", "while", "do", "else", "switch", "case", "default", "break", "continue",
    "throw", "using", "static_assert", "const", "constexpr", "static", "auto", "typename",
    "template", "struct", "class", "delete", "new", "goto", "try", "catch", "public", "private",
    "friend", "extern", "namespace", "typedef", "enum", "operator", "inline",
}  # fmt: skip
# In whose parentheses nothing is changed.
NO_CHANGE = {"alignas", "sizeof", "decltype", "__attribute__", "noexcept", "HW_UNROLL_BY"}
# Calls that state what must hold, of which refusals have tests of their own.
CHECK = re.compile(r"check(_\w+)?$")


@dataclass(frozen=True)
class Mutant:
    """A change: text put around a part of the source, and text in place of tokens.

    In all of it {n} stands for the number of the switch.
    """

    file: str  # under csrc/
    line: int
    last_line: int
    kind: str
    original: str  # what is changed, one line
    mutated: str
    text: str  # the line of the source
    around: tuple[int, int, str, str] | None = None  # from, to, before it, behind it
    tokens: tuple[tuple[int, int, str], ...] = ()  # from, to, new text
    occurrence: int = 0  # of the same change in the same text

    @property
    def key(self) -> str:
        """The same from day to day while the line stays as it is."""
        parts = (self.file, self.text, self.original, self.mutated, self.kind, self.occurrence)
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.original}  ->  {self.mutated}"


class Finder:
    """All mutants of one file."""

    def __init__(self, file: str, text: str):
        self.file, self.source = file, Source(text)
        self.tokens = self.source.tokens
        self.lines = text.split("\n")

    def find(self) -> list[Mutant]:
        self._skip()
        found: list[Mutant] = []
        for i, token in enumerate(self.tokens):
            if token.skipped or self.source.scope(i) not in ("block", "type"):
                continue
            in_block = self.source.scope(i) == "block"
            if not in_block and not self._in_parentheses(i):
                continue
            for rule in (self._operator, self._number, self._logic, self._subscript, self._swap):
                found += rule(i)
            if in_block:
                found += self._statement(i)
                found += self._condition(i)
        return _numbered(found)

    # ---- Where nothing is changed

    def _skip(self):
        tokens, source = self.tokens, self.source
        for i, token in enumerate(tokens):
            word = token.text
            if token.kind != "name":
                continue
            if word in ("using", "typedef", "static_assert", "asm", "case", "concept", "throw"):
                end = source.end_of_statement(i)
                if word == "case":
                    end = next(j for j in range(i, len(tokens)) if tokens[j].text == ":")
                source.skip(i, end if end > 0 else i)
            elif word in NO_CHANGE or CHECK.match(word):
                if tokens[i + 1].text == "(":
                    source.skip(i, tokens[i + 1].partner)
            elif word == "constexpr" and tokens[i - 1].text == "if":
                source.skip(i + 1, tokens[i + 1].partner)
            elif word == "constexpr":
                j = i
                while tokens[j].text not in ("=", ";", "(", "{"):
                    j += 1
                if tokens[j].text in ("=", "{"):
                    source.skip(i, max(source.end_of_statement(i), i))
            elif word == "requires":
                j = i
                while tokens[j].text not in ("{", ";"):
                    j += 1
                source.skip(i, max(j, tokens[j].partner))
            elif word == "enum":
                source.skip(i, max(source.end_of_statement(i), i))
        for i, token in enumerate(tokens):
            if token.text == "[" and self._declares_array(i):
                source.skip(i, token.partner)

    def _declares_array(self, i: int) -> bool:
        if self.tokens[i - 1].text == "]":
            return self.tokens[self.tokens[i - 1].partner].skipped
        if self.tokens[i - 1].text == ")":  # of a parameter, Type (&name)[...]
            return self.tokens[self.tokens[i - 1].partner + 1].text == "&"
        if self.tokens[i - 1].kind != "name":
            return False
        before = self.tokens[i - 2]
        first = i - 2  # what stands before the name, or before its *
        if before.text == "*" and not self.source.spaced(i - 2):
            first = i - 3
        if self.tokens[first].text == ",":  # a[2], b[2]
            last = first - 1
            if self.tokens[last].text == "}":  # a[2] = {}, b[2]
                last = self.tokens[last].partner - 2
            return self.tokens[last].text == "]" and self.tokens[self.tokens[last].partner].skipped
        if first < i - 2:  # Type *a[2]
            word = self.tokens[first]
            return word.kind == "name" and word.text not in ("return", "else", "case")
        if before.kind == "name":
            return before.text not in ("return", "else", "case")
        return before.text in (">", "&", "*") and before.tight

    def _in_parentheses(self, i: int) -> bool:
        parent = self.tokens[i].parent
        return parent >= 0 and self.tokens[parent].text == "("

    # ---- Rules: token i -> mutants

    def _make(self, i: int, kind: str, original: str, mutated: str, **edit) -> Mutant:
        """`edit`: around, tokens, or `token`: what stands in place of token i."""
        token = self.tokens[i]
        if new := edit.pop("token", None):
            edit["tokens"] = ((token.start, token.end, new),)
        text = " ".join(self.lines[token.line - 1].split())
        return Mutant(
            self.file,
            token.line,
            edit.pop("last_line", token.line),
            kind,
            _short(original),
            _short(mutated),
            text,
            **edit,
        )

    def _place(self, first: int, last: int, before: str, behind: str):
        return self.tokens[first].start, self.tokens[last].end, before, behind

    def _operator(self, i: int) -> Iterator[Mutant]:
        word = self.tokens[i].text
        if self.tokens[i].kind != "sign":
            return
        if word in INFIX and self.source.spaced(i) and self._ends_operand(i - 1):
            name, other = INFIX[word]
            kind = "comparison" if word in COMPARISONS else "arithmetic"
            around = self._around(i)
            yield self._make(
                i, kind, around.format(word), around.format(other),
                token=f"{word} hwm::{name}{{{{n}}}} {word}",
            )  # fmt: skip
        elif word in ("+=", "-=") and self.source.spaced(i):
            name, other = ("Plus", "-=") if word == "+=" else ("Minus", "+=")
            around = self._around(i)
            yield self._make(
                i, "sign", around.format(word), around.format(other),
                token=f"{word} hwm::{name}{{{{n}}}} {word}",
            )  # fmt: skip
        elif word in ("-", "!") and self.tokens[i + 1].tight and not self._ends_operand(i - 1):
            if self.tokens[i - 1].text in ("*", "/", "%", "-", "!", "&", "operator"):
                return
            what = f"{word}{self.tokens[i + 1].text}"
            name = "Negative" if word == "-" else "Not"
            yield self._make(
                i, "sign" if word == "-" else "condition", what, what[1:],
                token=f"hwm::{name}{{{{n}}}} * ",
            )  # fmt: skip

    def _ends_operand(self, i: int) -> bool:
        token = self.tokens[i]
        if token.kind == "name":
            return token.text not in ("return", "case", "operator", "else")
        if token.text == ">":
            return False
        return token.kind in ("number", "string") or token.text in (")", "]", "}")

    def _around(self, i: int) -> str:
        """Some text on both sides of token i, itself as {}."""
        line = self.tokens[i].line
        first = last = i
        while first > 0 and self.tokens[first - 1].line == line and i - first < 6:
            first -= 1
        while last + 1 < len(self.tokens) and self.tokens[last + 1].line == line and last - i < 6:
            last += 1
        left = self.source.text[self.tokens[first].start : self.tokens[i].start]
        right = self.source.text[self.tokens[i].end : self.tokens[last].end]
        return (
            left.replace("{", "{{").replace("}", "}}")
            + "{}"
            + right.replace("{", "{{").replace("}", "}}")
        )

    def _number(self, i: int) -> Iterator[Mutant]:
        token = self.tokens[i]
        if token.kind != "number" or not re.fullmatch(r"\d+(\.\d+)?f?[uUlL]*", token.text):
            return
        digits = re.match(r"\d+", token.text).group()
        before = self.tokens[i - 1].text
        fewer = digits != "0" and self._subscribes(i)  # what is named there is in bounds
        step = -1 if fewer or (digits == "1" and before in ("+", "-")) else 1
        other = str(int(digits) + step) + token.text[len(digits) :]
        around = self._around(i)
        yield self._make(
            i, "constant", around.format(token.text), around.format(other),
            token=f"hwm::number({{n}}, {token.text}, {other})",
        )  # fmt: skip

    def _subscribes(self, i: int) -> bool:
        """The number that is all there is between [ and ]."""
        t = self.tokens
        return t[i].kind == "number" and t[i - 1].text == "[" and t[i + 1].text == "]"

    def _logic(self, i: int) -> Iterator[Mutant]:
        """L && R <-> L || R, by De Morgan: on != ((on != L) && (on != R))."""
        word = self.tokens[i].text
        if word not in ("&&", "||") or not self.source.spaced(i):
            return
        first, last = self._operand(i, -1), self._operand(i, 1)
        other = "||" if word == "&&" else "&&"
        on = "hwm::on({n})"
        around = self._around(i)
        yield self._make(
            i, "logic", around.format(word), around.format(other),
            around=self._place(first, last, f"({on} != (({on} != static_cast<bool>(", "))))"),
            token=f")) {word} ({on} != static_cast<bool>(",
        )  # fmt: skip

    def _operand(self, i: int, step: int) -> int:
        """The last token of the operand to the left (-1) or right (+1) of a logical operator."""
        word = self.tokens[i].text
        # To the left the chain of the same operator belongs to it.
        ends = {";", ",", "?", ":", "{", "}", "(", "[", ")", "]", "return", *ASSIGNMENTS}
        if word == "&&":
            ends.add("||")
        if step > 0:
            ends.add(word)
        j = i + step
        while True:
            token = self.tokens[j]
            if token.text in (")]}" if step < 0 else "([{") and token.kind == "sign":
                if step > 0 and token.text == "{" and self.tokens[j - 1].text == ")":
                    break  # a body
                j = token.partner + step
                continue
            if token.text in ends and not (token.skipped and token.text in "<>,"):
                break
            if token.text == ">" and token.skipped and step < 0 and token.partner >= 0:
                j = token.partner - 1
                continue
            if token.text == "<" and token.skipped and step > 0 and token.partner >= 0:
                j = token.partner + 1
                continue
            j += step
        return j - step

    def _subscript(self, i: int) -> Iterator[Mutant]:
        token = self.tokens[i]
        if token.text != "[" or token.partner < i + 2 or not self._ends_operand(i - 1):
            return
        if self.tokens[i + 1].text == "[":  # an attribute
            return
        first, last = i + 1, token.partner - 1
        if self._subscribes(first):  # _number changes it
            return
        if first == last and re.fullmatch(r"k[A-Z]\w*", self.tokens[first].text):
            return  # the size of an array that is declared
        inside = self.source.slice(first, last)
        yield self._make(
            i, "index", f"[{inside}]", f"[{inside} + 1]",
            around=self._place(first, last, "hwm::index({n}, ", ")"),
        )  # fmt: skip

    def _swap(self, i: int) -> Iterator[Mutant]:
        """f(a, b, ...) and [a][b] of two plain names."""
        t = self.tokens
        if i + 4 >= len(t) or not self._ends_operand(i - 1):
            return
        call = t[i].text == "(" and t[i - 1].kind == "name" and t[i + 2].text == ","
        if call and t[i + 4].text in (",", ")"):
            a, b = i + 1, i + 3
        elif t[i].text == "[" and [t[i + 2].text, t[i + 3].text] == ["]", "["]:
            a, b = i + 1, i + 4
            if t[i + 5].text != "]" or t[i - 1].text == "]":
                return
        else:
            return
        names = t[a].text, t[b].text
        plain = re.compile(r"(?!k[A-Z]|true|false|nullptr|this)[a-z]\w*")
        if names[0] == names[1] or not all(plain.fullmatch(n) for n in names):
            return
        if call and t[i - 2].kind == "name" and t[i - 2].text not in ("return", "else"):
            return  # a declaration
        middle = self.source.text[t[a].end : t[b].start]
        shown = t[i - 1].text + t[i].text
        yield self._make(
            i, "swap", shown + middle.join(names), shown + middle.join(names[::-1]),
            tokens=(
                (t[a].start, t[a].end, f"hwm::either({{n}}, {names[0]}, {names[1]})"),
                (t[b].start, t[b].end, f"hwm::either({{n}}, {names[1]}, {names[0]})"),
            ),
        )  # fmt: skip

    def _statement(self, i: int) -> Iterator[Mutant]:
        """An assignment or a call that is left out."""
        t = self.tokens
        parent = t[i].parent
        if parent < 0 or t[parent].text != "{" or not self._begins_statement(i):
            return
        j = self._chain(i)
        if j < 0:
            return
        end = self.source.end_of_statement(i)
        if end < 0:
            return
        called = t[j].text == ";" and t[j - 1].text == ")"
        if not called and not (t[j].text in ASSIGNMENTS and self.source.spaced(j)):
            return
        statement = self.source.slice(i, end)
        kind = "assignment left out"
        if called:
            kind = "barrier left out" if BARRIERS.match(statement) else "call left out"
        around = self._place(i, end - 1, "(hwm::on({n}) ? (void)0 : (void)(", "))")
        last = t[end].line
        yield self._make(i, kind, statement, "", around=around, last_line=last)
        later = re.search(r"\bcopy_async_wait<(\d+)>\(\)", statement) or re.search(
            r"\bwait<(\d+)>\(\)", statement
        )
        if later:
            before = "(hwm::on({n}) ? (void)(%s) : (void)("
            wrong = statement.replace(f"<{later[1]}>", f"<{int(later[1]) + 1}>").rstrip(";")
            yield self._make(
                i, "barrier left out", statement, wrong + ";",
                around=self._place(i, end - 1, before % wrong, "))"),
            )  # fmt: skip

    def _begins_statement(self, i: int) -> bool:
        t = self.tokens
        if t[i].kind != "name" and t[i].text != "*":
            return False
        if t[i].text in NO_STATEMENT or t[i].text.startswith("HW_") or CHECK.match(t[i].text):
            return False
        before = t[i - 1]
        if before.text in (";", "{", "}", "else"):
            return True
        if before.text != ")":
            return False
        head = t[before.partner - 1].text
        return head in ("if", "for", "while", "constexpr")

    def _chain(self, i: int) -> int:
        """Behind a name with its members, subscripts and calls; -1 if that is not what it is."""
        t = self.tokens
        j = i
        while t[j].text == "*":
            j += 1
        if t[j].kind != "name":
            return -1
        j += 1
        while j < len(t):
            if t[j].text in (".", "->", "::") and t[j + 1].kind == "name":
                j += 3 if t[j + 1].text == "template" else 2
            elif t[j].text in ("(", "[", "<") and t[j].tight and t[j].partner > j:
                j = t[j].partner + 1
            else:
                return j
        return -1

    def _condition(self, i: int) -> Iterator[Mutant]:
        """The condition of an if or a ternary, where no comparison in it is changed anyway."""
        t = self.tokens
        if t[i].text == "if" and t[i + 1].text == "(":
            first, last = i + 2, t[i + 1].partner - 1
        elif t[i].text == "?":
            first, last = self._operand(i, -1), i - 1
        else:
            return
        inside = [x for x in t[first : last + 1] if not x.skipped]
        if any(x.text in (*COMPARISONS, "&&", "||", ";", "=", "!") for x in inside):
            return
        if first > last or t[first].skipped:
            return
        text = self.source.slice(first, last)
        yield self._make(
            i, "condition", text, f"!({text})",
            around=self._place(first, last, "hwm::condition({n}, ", ")"),
        )  # fmt: skip


def _short(text: str) -> str:
    return " ".join(text.split())[:100]


def _numbered(found: list[Mutant]) -> list[Mutant]:
    seen: dict[str, int] = {}
    result = []
    for m in found:
        n = seen[m.key] = seen.get(m.key, -1) + 1
        result.append(Mutant(**{**vars(m), "occurrence": n}))
    return result


def rewritten(text: str, mutants: dict[int, Mutant]) -> str:
    """The source with a switch for each mutant, line numbers kept.

    The first line, the licence, makes room for the header of the switches.
    """
    # At one place: first what ends there, the inner one first; then what begins, the outer one
    # first; then what stands in place of a token.
    edits: list[tuple[int, tuple[int, int], int, str]] = []  # at, order, removed, text
    for n, m in mutants.items():
        if m.around:
            first, last, before, behind = m.around
            edits.append((last, (0, last - first), 0, _with_number(behind, n)))
            edits.append((first, (1, first - last), 0, _with_number(before, n)))
        for first, last, new in m.tokens:
            edits.append((first, (2, 0), last - first, _with_number(new, n)))
    pieces, at = [], 0
    for where, _, removed, new in sorted(edits, key=lambda e: e[:2]):
        pieces += [text[at:where], new]
        at = where + removed
    pieces.append(text[at:])
    result = "".join(pieces)
    return '#include "core/mutants.h"' + result[result.index("\n") :]


def _with_number(text: str, n: int) -> str:
    return text.replace("{n}", str(n))
