"""How well a model predicts source text, in bits per byte, beside what `xz -9` makes of it.

    python -m turboquant.demo.evaluate [--folder FOLDER] [--files N] [--device DEVICE]

A model that gives a byte the probability p can be turned into a compressor that spends -log2 p
bits on it, so its mean is directly comparable with the size of a compressed file.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from turboquant.demo import MODEL_FOLDER
from turboquant.demo.corpus import Document, standard_library
from turboquant.demo.model import END, load

Logits = Callable[[Tensor], Tensor]
"""A causal model: token ids int64 [B, L] to next-token logits [B, L, 257]."""

LIMITS = (512, 8192)  # tokens of context; the model was trained at the larger
_BATCH = 16384  # tokens a forward pass


def byte_bits(model: Logits, text: bytes, limit: int, stride: int | None = None) -> Tensor:
    """The bits that a model spends on each byte of a text: float32 [len(text)].

    The model reads END and then the text, never more than `limit` tokens at once: a window of that
    width moves on by `stride` (a quarter of it by default) and scores what it is the first to
    reach.  So a byte is predicted from everything before it, or, further in than `limit`, from at
    least the last `limit - stride` bytes.
    """
    inputs, targets = torch.tensor([END, *text[:-1]]), torch.tensor(list(text))
    width = min(limit, len(text))
    starts = [*range(0, len(text) - width, stride or max(1, limit // 4)), len(text) - width]
    windows = torch.tensor(starts)[:, None] + torch.arange(width)
    bits = torch.empty(len(text))
    with torch.inference_mode():
        # From the last window to the first, so the first to reach a byte has the last word on it.
        for some in windows.flip(0).split(max(1, _BATCH // width)):
            logits = model(inputs[some]).float().flatten(0, 1)
            wanted = targets[some].flatten().to(logits.device)
            nats = F.cross_entropy(logits, wanted, reduction="none").cpu().view_as(some)
            for window, scored in zip(some, nats, strict=True):
                bits[window] = scored / math.log(2)
    return bits


def bits_per_byte(model: Logits, documents: Sequence[Document], limit: int) -> float:
    """The mean of `byte_bits` over all bytes of the documents, each read alone from its start."""
    scores = [byte_bits(model, d.text, limit) for d in tqdm(documents, f"context {limit}")]
    return torch.cat(scores).mean().item()


def xz_bits_per_byte(texts: Sequence[bytes], preset: int = 9) -> float:
    """What `xz` needs for the texts, each compressed alone; `9 | lzma.PRESET_EXTREME` is -9e."""
    compressed = sum(len(lzma.compress(text, preset=preset)) for text in texts)
    return 8 * compressed / sum(map(len, texts))


def report(model: Logits, documents: Sequence[Document]) -> dict[str, float]:
    """Every figure of this page over the same bytes: the model at each limit, and four times xz."""
    texts = [document.text for document in documents]
    extreme = 9 | lzma.PRESET_EXTREME
    return {
        "files": len(texts),
        "bytes": sum(map(len, texts)),
        **{f"model, context {limit}": bits_per_byte(model, documents, limit) for limit in LIMITS},
        "xz -9, each file": xz_bits_per_byte(texts),
        "xz -9e, each file": xz_bits_per_byte(texts, extreme),
        "xz -9, concatenated": xz_bits_per_byte([b"".join(texts)]),
        "xz -9e, concatenated": xz_bits_per_byte([b"".join(texts)], extreme),
    }


def held_out(folder: Path = MODEL_FOLDER) -> list[Document]:
    """This interpreter's versions of the standard library files that a model never saw.

    The model's own log names them: the rule that chose them would, on another Python, also choose
    files whose text stood elsewhere in the standard library that it learned from.
    """
    names = json.loads((folder / "training_log.json").read_text())["held_out"]
    return [document for document in standard_library() if document.name in names]


def main() -> None:
    """Prints the report for a stored model on this machine's held-out files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--files", type=int, help="only the N smallest held-out files")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    network = load(args.folder).to(args.device).eval()
    documents = sorted(held_out(args.folder), key=lambda document: len(document.text))
    for name, value in report(
        lambda ids: network(ids.to(args.device)), documents[: args.files]
    ).items():
        print(f"{name:24} {value:10.4g}")


if __name__ == "__main__":
    main()
