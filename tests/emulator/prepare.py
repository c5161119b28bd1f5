#!/usr/bin/env python3
"""prepare.py SRC OUT: copies SRC/csrc to OUT/csrc and turns CUDA into C++ for the emulator."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))


def masked(text):
    """The text with comments, strings and characters blanked, same length."""
    out, i, n = list(text), 0, len(text)
    while i < n:
        two = text[i : i + 2]
        if two == "//":
            j = text.find("\n", i)
            j = n if j < 0 else j
        elif two == "/*":
            j = text.find("*/", i)
            j = n if j < 0 else j + 2
        elif text[i] == '"' or (
            text[i] == "'" and not (i and (text[i - 1].isalnum() or text[i - 1] == "_"))
        ):
            j = i + 1
            while j < n and text[j] != text[i]:
                j += 2 if text[j] == "\\" else 1
            j += 1
        else:
            i += 1
            continue
        for k in range(i, min(j, n)):
            if out[k] != "\n":
                out[k] = " "
        i = j
    return "".join(out)


def matching(text, at, bracket, partner, step=1):
    """Where the partner of the bracket at `at` is. step -1: before it."""
    depth = 0
    for i in range(at, len(text) if step > 0 else -1, step):
        if text[i] == bracket:
            depth += 1
        elif text[i] == partner:
            depth -= 1
            if depth == 0:
                return i
    raise ValueError("unbalanced")


def launches(text):
    while True:
        m = masked(text)
        at = m.find("<<<")
        if at < 0:
            return text
        # backwards over the kernel's name
        i = at - 1
        while m[i].isspace():
            i -= 1
        if m[i] in ">)":
            i = matching(m, i, m[i], "<" if m[i] == ">" else "(", -1) - 1
        while i >= 0 and (m[i].isalnum() or m[i] in "_:.[]"):
            i -= 1
        begin = i + 1
        end = m.index(">>>", at)
        config, kernel = text[at + 3 : end], text[begin:at]
        open_ = m.index("(", end)
        if m[end + 3 : open_].strip():
            raise ValueError("strange launch: " + text[begin:open_])
        close = matching(m, open_, "(", ")")
        args = text[open_ + 1 : close]
        comma = ", " if m[open_ + 1 : close].strip() else ""
        text = (
            text[:begin]
            + "::emu::launch("
            + config
            + ")("
            + kernel
            + comma
            + args
            + ")"
            + text[close + 1 :]
        )


ALIGN = re.compile(
    r"(?:alignas|__align__)\s*\(([^()]*(?:\([^()]*\))?[^()]*)\)"
    r"|__attribute__\s*\(\(\s*aligned\s*\(([^()]*)\)\s*\)\)"
)
site = 0


def split_commas(s):
    parts, depth, last = [], 0, 0
    for i, c in enumerate(s):
        if c in "(<[{":
            depth += 1
        elif c in ")>]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(s[last:i])
            last = i + 1
    return parts + [s[last:]]


def shared(text, path):
    global site
    start = 0
    while True:
        m = masked(text)
        found = re.compile(r"\b__shared__\b").search(m, start)
        if not found:
            return text
        line = m.rfind("\n", 0, found.start()) + 1
        if m[line : found.start()].lstrip().startswith("#"):
            start = found.end()
            continue
        begin = max(m.rfind(c, 0, found.start()) for c in ";{}") + 1
        # not into a directive or label
        for d in re.finditer(r"^[ \t]*#.*$", m[begin : found.start()], re.M):
            begin += d.end()
            break
        end = m.index(";", found.end())
        statement = text[begin:end]
        body = masked(statement)
        lead = len(body) - len(body.lstrip())
        newlines = "\n" * statement[lead:].count("\n")
        align = [a or b for a, b in ALIGN.findall(body)]
        body = ALIGN.sub(" ", body)
        dynamic = re.search(r"\bextern\b", body) is not None
        body = re.sub(r"\b(extern|static|__shared__|volatile)\b", " ", body).strip()
        body = re.sub(r"\s+", " ", body)
        alignment = align[0] if align else "0"
        if dynamic:
            d = re.match(r"^(.*?)([A-Za-z_]\w*) ?\[ ?\]$", body)
            if not d:
                raise ValueError(f"{path}: cannot read: {statement.strip()}")
            kind = d[1].strip()
            new = f"{kind}* const {d[2]} = static_cast<{kind}*>(::emu::dynamic_shared({alignment}))"
        else:
            parts = split_commas(body)
            d = re.match(r"^(.*[\s*&>])([A-Za-z_]\w*)\s*((?:\[.*\])?)$", parts[0])
            if not d:
                raise ValueError(f"{path}: cannot read: {statement.strip()}")
            kind, declarators = d[1].strip(), [(d[2], d[3])]
            for p in parts[1:]:
                e = re.match(r"^\s*([A-Za-z_]\w*)\s*((?:\[.*\])?)\s*$", p)
                declarators.append((e[1], e[2]))
            new = []
            for name, dims in declarators:
                site += 1
                place = f"(__PRETTY_FUNCTION__, {site}, {alignment})"
                new.append(f"auto& {name} = ::emu::shared<{kind}{dims}>{place}")
            new = "; ".join(new)
        text = text[:begin] + text[begin : begin + lead] + new + newlines + text[end:]
        start = begin + lead + len(new)


def functions(text):
    """name -> whole text, of the functions in ptx.cuh."""
    m, found = masked(text), {}
    for f in re.finditer(
        r"(?:template\s*<[^>]*>\s*)?__device__\s+inline\s+[\w:]+[\s&*]+(\w+)\s*\(", m
    ):
        close = matching(m, f.end() - 1, "(", ")")
        brace = m.index("{", close)
        end = matching(m, brace, "{", "}")
        name, n = f[1], 2
        while name in found:
            name, n = f"{f[1]}#{n}", n + 1
        found[name] = re.sub(r"\s+", " ", text[f.start() : end + 1])
    return found


def check_ptx(path):
    real = functions(Path(path).read_text())
    mine = Path(os.path.join(HERE, "ptx.cuh")).read_text()
    missing = [f for f in real if not re.search(r"\b" + f.split("#")[0] + r"\(", mine)]
    if missing:
        print("ptx.cuh has functions that the emulator lacks: " + ", ".join(missing))
    return not missing


def convert(text, path):
    if path.endswith((".cu", ".cuh")):
        # What is only for Hopper's tensor cores is not compiled here.
        code = re.sub(r"#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n.*?\n#(else|endif)", "", text, flags=re.S)
        if re.search(r"\basm\s*(volatile)?\s*\(", masked(code)):
            raise ValueError(f"{path}: assembly outside of ptx.cuh")
        text = launches(text)
        text = shared(text, path)
        text = re.sub(r"(?<!\()\b__noinline__\b", "EMU_NOINLINE", text)
    return text


def main():
    if sys.argv[1] == "--file":
        path, to = sys.argv[2:4]
        Path(to).write_text(f'#line 1 "{path}"\n' + convert(Path(path).read_text(), path))
        return
    source, out = sys.argv[1], sys.argv[2]
    good = True
    wanted = set()
    for folder, _, names in os.walk(os.path.join(source, "csrc")):
        relative = os.path.relpath(folder, source)
        if relative.startswith("csrc/cpu"):
            continue
        for name in sorted(names):
            if not name.endswith((".cu", ".cuh", ".h", ".hpp", ".cpp", ".inl")):
                continue
            path = os.path.join(folder, name)
            to = os.path.join(out, relative, name)
            wanted.add(to)
            text = Path(path).read_text()
            if relative == "csrc/cuda/device" and name == "ptx.cuh":
                good &= check_ptx(path)
                text = Path(os.path.join(HERE, "ptx.cuh")).read_text()
                path = os.path.join(HERE, "ptx.cuh")
            global site
            site = 0
            try:
                new = f'#line 1 "{path}"\n' + convert(text, path)
            except ValueError as e:
                print(f"prepare: LEFT OUT: {e}")
                new = f'#error "{e}"\n'
            os.makedirs(os.path.dirname(to), exist_ok=True)
            if not os.path.exists(to) or Path(to).read_text() != new:
                Path(to).write_text(new)
    for folder, _, names in os.walk(os.path.join(out, "csrc")):
        for name in names:
            if os.path.join(folder, name) not in wanted:
                os.remove(os.path.join(folder, name))
    sys.exit(0 if good else 1)


main()
