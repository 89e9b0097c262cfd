# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for the C++ of this repository, as clang-format leaves it.

Layout carries what a parser would have to know: a binary operator has blanks on both sides, and the
brackets of templates, references and pointers have none on their inner side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<comment>//[^\n]*|/\*.*?\*/)"
    r"|(?P<directive>^[ \t]*\#(?:[^\n\\]|\\.|\\\n)*)"
    r"|(?P<string>(?:u8|[uUL])?\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')"
    r"|(?P<number>\.?\d(?:[eEpP][+-]|'?[\w.])*)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign>\.\.\.|<=>|->\*|<<=|>>=|::|->|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)",
    re.DOTALL | re.MULTILINE,
)
PAIRS = {")": "(", "]": "[", "}": "{"}
# Conditions of the preprocessor that hold in the build of the mutants, and those that do not.
HOLDS = ("HW_EMULATE", "__AVX2__", "__F16C__", "__SSE2__", "__FMA__", "_OPENMP")


@dataclass
class Token:
    kind: str
    text: str
    start: int
    end: int
    line: int
    tight: bool = False  # no blank before it
    partner: int = -1  # the matching bracket
    parent: int = -1  # the bracket around it
    skipped: bool = False  # no place for a switch
    scope: str = ""  # of "{": block, type, namespace


class Source:
    """The tokens of a file, its brackets matched."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[Token] = []
        self._split()
        self._match()
        self._match_templates()
        for i, token in enumerate(self.tokens):
            if token.text == "{":
                token.scope = self._scope_of(i)

    def _split(self):
        line, tight, active = 1, False, ["yes"]
        for match in TOKEN.finditer(self.text):
            kind, text = match.lastgroup, match.group()
            if kind == "directive":
                _follow(active, text.strip())
            elif kind not in ("space", "comment") and set(active) == {"yes"}:
                token = Token(kind, text, match.start(), match.end(), line, tight)
                self.tokens.append(token)
            tight = kind not in ("space", "comment", "directive")
            line += text.count("\n")

    def _match(self):
        opened: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.text in PAIRS and token.kind == "sign":
                while opened:
                    begin = opened.pop()
                    if self.tokens[begin].text == PAIRS[token.text]:
                        token.partner, self.tokens[begin].partner = begin, i
                        break
            token.parent = opened[-1] if opened else -1
            if token.text in PAIRS.values() and token.kind == "sign":
                opened.append(i)

    def _match_templates(self):
        """< of templates and their ends; no switch stands between them."""
        for i, token in enumerate(self.tokens):
            if token.text != "<" or token.partner >= 0 or i == 0:
                continue
            before = self.tokens[i - 1]
            if before.text != "template" and not (token.tight and before.kind == "name"):
                continue
            depth, j = 1, i + 1
            while j < len(self.tokens) and depth:
                at = self.tokens[j]
                if at.text in "([{" and at.partner > j:
                    j = at.partner
                elif at.text in (";", ")", "]", "}"):
                    break
                elif at.text == "<" and at.tight:
                    depth += 1
                elif at.text == ">":
                    depth -= 1
                j += 1
            if depth == 0:
                token.partner, self.tokens[j - 1].partner = j - 1, i
                for k in range(i, j):
                    self.tokens[k].skipped = True

    def _scope_of(self, i: int) -> str:
        parent = self.tokens[i].parent
        around = self.tokens[parent].scope if parent >= 0 else "namespace"
        if parent >= 0 and self.tokens[parent].text != "{":
            around = "block"
        j = i - 1
        while j >= 0 and self.tokens[j].text not in ("{", "}", ";"):
            j = self.tokens[j].partner - 1 if self.tokens[j].text in ")]" else j - 1
        head = {t.text for t in self.tokens[j + 1 : i] if not t.skipped}
        before = self.tokens[i - 1].text if i else ""
        if before == ")" or before in ("const", "noexcept", "override", "else", "do", "try"):
            return "block"
        if "enum" in head:
            return "enum"
        if head & {"struct", "class", "union"}:
            return "type"
        if "->" in head:
            return "block"
        if "namespace" in head or "extern" in head:
            return "namespace"
        return "block" if around in ("block", "type") else around

    def scope(self, i: int) -> str:
        """Of the innermost braces around token i."""
        j = self.tokens[i].parent
        while j >= 0 and self.tokens[j].text != "{":
            j = self.tokens[j].parent
        return self.tokens[j].scope if j >= 0 else "namespace"

    def spaced(self, i: int) -> bool:
        """Whether blanks stand on both sides: a binary operator."""
        after = i + 1 < len(self.tokens) and not self.tokens[i + 1].tight
        return not self.tokens[i].tight and after

    def skip(self, first: int, last: int):
        for k in range(first, last + 1):
            self.tokens[k].skipped = True

    def end_of_statement(self, i: int) -> int:
        """The ; behind token i among the same brackets, or -1."""
        parent = self.tokens[i].parent
        j = i
        while j < len(self.tokens):
            token = self.tokens[j]
            if token.parent == parent and token.text == ";":
                return j
            if token.text in ("(", "[", "{") and token.partner > j:
                j = token.partner
            elif token.text in PAIRS and token.partner == parent:
                return -1
            j += 1
        return -1

    def slice(self, first: int, last: int) -> str:
        return self.text[self.tokens[first].start : self.tokens[last].end]


def _follow(active: list[str], directive: str):
    """`active`: for each open #if whether its lines are compiled: "yes", "not yet", "no more"."""
    words = directive[1:].split(None, 1)
    if not words:
        return
    word, rest = words[0], words[1] if len(words) > 1 else ""
    if word in ("if", "ifdef", "ifndef"):
        active.append("yes" if _holds(rest) != (word == "ifndef") else "not yet")
    elif word in ("elif", "else") and len(active) > 1:
        if active[-1] != "not yet":
            active[-1] = "no more"
        elif word == "else" or _holds(rest):
            active[-1] = "yes"
    elif word == "endif" and len(active) > 1:
        active.pop()


def _holds(condition: str) -> bool:
    terms = re.findall(r"(!?)\s*(?:defined\s*\(?\s*)?(\w+)", condition)
    name = next(((negated, n) for negated, n in terms if n != "defined"), ("", ""))
    return (name[1] in HOLDS) != (name[0] == "!")
