"""Trains the demo model on the Python source of this machine and writes its Hugging Face folder.

    python -m turboquant.demo.train --minutes 9

It is made for one recent NVIDIA GPU.  All text lies on it as token ids, and a batch is windows cut
from that.  The schedule follows progress, the part of the steps or minutes that is used up:
contexts grow from 2048 to 8192 tokens halfway, and learning rates rise, hold and fall linearly to
zero.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from turboquant.demo import MODEL_FOLDER, corpus, evaluate
from turboquant.demo.card import model_card
from turboquant.demo.corpus import Document
from turboquant.demo.model import END, ByteLlama, Config, load, save
from turboquant.demo.muon import Muon

PACKAGES = """
absl-py accelerate aiohttp attrs botorch build click cloudpickle coverage cupy-cuda13x cython
diffrax e3nn einops equinox flax fonttools fsspec gpytorch h5py httpcore httpx huggingface-hub jax
jinja2 joblib lightning linear-operator markdown matplotlib meson mpmath networkx numba numpy
numpyro onnxscript optax packaging pandas patsy peft pillow pip pluggy psutil pygments pyparsing
pytest python-dateutil requests rich scikit-build-core scikit-image scikit-learn scipy seaborn
sentence-transformers setuptools simplejson statsmodels sympy tensorboard timm torch
torch-geometric torchmetrics torchvision typer urllib3 werkzeug wheel yarl
"""
"""Learned from where installed, unless the metadata fails to state a permissive licence."""

STDLIB_SHARE = 0.2
"""Of the windows. It is the kind of text meant, but small: much more would be learned by heart."""

DOCUMENT_SHARE = 0.25
"""Of the windows begin where a document begins, as prompts do."""

Origins = list[dict[str, Any]]


class Stream:
    """Documents as one row of token ids on a device, each between two ENDs."""

    def __init__(self, documents: Iterable[Document], device: str) -> None:
        joined = bytearray(b"\n".join(document.text for document in documents))
        lengths = torch.tensor([len(document.text) + 1 for document in documents])
        self.starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        self.tokens = torch.cat(
            (
                torch.tensor([END], dtype=torch.int16),
                torch.frombuffer(joined + b"\n", dtype=torch.uint8),
            )
        )
        self.tokens[self.starts] = END
        self.starts, self.tokens = self.starts.to(device), self.tokens.to(device)

    def windows(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Random windows of the stream, int64 [rows, length]."""
        device = self.tokens.device
        anywhere, document, kind = torch.rand(
            (3, rows), generator=generator, device=device, dtype=torch.float64
        )
        begins = torch.where(
            kind < DOCUMENT_SHARE,
            self.starts[(document * len(self.starts)).long()],
            (anywhere * len(self.tokens)).long(),
        ).clamp(max=len(self.tokens) - length)
        return self.tokens[begins[:, None] + torch.arange(length, device=device)].long()


def collect(names: Iterable[str]) -> tuple[list[Document], list[Document], list[Document], Origins]:
    """Held-out files, the standard library without them, packages, and what each contributed."""
    library = corpus.standard_library()
    held_out = [document for document in library if corpus.is_held_out(document)]
    secret = corpus.passages(held_out)
    kept: list[list[Document]] = []
    origins: Origins = []

    def add(name: str, version: str, licence: str, found: Sequence[Document]) -> None:
        """Keeps what does not repeat a held-out file, and notes how much that is."""
        clean = corpus.without_leaks(found, secret)
        kept.append(clean)
        origins.append(
            {
                "name": name,
                "version": version,
                "licence": licence,
                "files": len(clean),
                "bytes": sum(len(document.text) for document in clean),
                "dropped": len(found) - len(clean),
            }
        )

    known = [document for document in library if not corpus.is_held_out(document)]
    add("CPython standard library", platform.python_version(), "PSF-2.0", known)
    for name in tqdm(names, "reading packages"):
        try:
            found = corpus.package(name)
        except (PackageNotFoundError, ValueError) as reason:
            tqdm.write(f"left out: {reason}")
        else:
            installed = distribution(name)
            add(name, installed.version, corpus.licence(installed), found)
    stdlib, *packages = kept
    return held_out, stdlib, [document for some in packages for document in some], origins


def train(
    model: ByteLlama,
    stdlib: Stream,
    others: Stream | None,
    *,
    steps: float = math.inf,
    minutes: float = math.inf,
    seed: int = 0,
    batch_tokens: int = 1 << 17,
    learning_rate: float = 8e-3,
) -> list[dict[str, float]]:
    """Trains in place until the steps or the minutes are used up; returns the curve.

    Both contexts are compiled before the clock starts.
    """
    device = stdlib.tokens.device
    generator = torch.Generator(device).manual_seed(seed)

    @torch.compile(disable=device.type == "cpu", dynamic=False)
    def loss_of(tokens: Tensor) -> Tensor:
        """Mean bits a byte."""
        with torch.autocast("cuda", torch.bfloat16):  # a CPU stays in float32
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        return loss / math.log(2)

    def batch(context: int) -> Tensor:
        rows = max(1, batch_tokens // context)
        of_stdlib = max(1, round(STDLIB_SHARE * rows)) if others else rows
        windows = [stdlib.windows(of_stdlib, context + 1, generator)]
        if others:
            windows.append(others.windows(rows - of_stdlib, context + 1, generator))
        return torch.cat(windows)

    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    rest = [weight for name, weight in model.named_parameters() if "proj" not in name]
    optimizers = [
        Muon(matrices, learning_rate),
        torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    longest = model.config.max_position_embeddings
    for context in (longest // 4, longest):  # compiles
        loss_of(batch(context)).backward()
    model.zero_grad()

    curve: list[dict[str, float]] = []
    step, began = 0, time.monotonic()
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while (progress := max(step / steps, (time.monotonic() - began) / 60 / minutes)) < 1:
            context = longest // 4 if progress < 0.5 else longest
            rate = learning_rate * min(1.0, (progress + 0.001) / 0.02, (1 - progress) / 0.6)
            loss = loss_of(batch(context))
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            model.zero_grad()
            step += 1
            if step % 10 == 0 or step == steps:  # to read the loss is to wait for the device
                bits, seconds = round(loss.item(), 4), round(time.monotonic() - began, 1)
                bar.n = round(100 * progress)
                bar.set_postfix(step=step, context=context, bits=bits)
                curve.append({"step": step, "seconds": seconds, "context": context, "bits": bits})
    return curve


def main() -> None:
    """Collects, trains, saves, measures what was saved, and writes the log and the model card."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="the folder to write")
    parser.add_argument("--minutes", type=float, default=math.inf, help="budget in minutes")
    parser.add_argument("--steps", type=float, default=math.inf, help="budget in steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=1 << 17, help="tokens a step")
    parser.add_argument(
        "--packages", nargs="*", default=PACKAGES.split(), help="learn from these, too"
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if math.isinf(min(args.minutes, args.steps)):
        parser.error("give a budget: --minutes, --steps or both")

    held_out, stdlib, others, origins = collect(args.packages)
    torch.manual_seed(args.seed)
    model = ByteLlama(Config()).to(args.device)
    curve = train(
        model,
        Stream(stdlib, args.device),
        Stream(others, args.device) if others else None,
        steps=args.steps,
        minutes=args.minutes,
        seed=args.seed,
        batch_tokens=args.batch_tokens,
    )
    save(model, args.out)
    stored = load(args.out).to(args.device)

    def logits(ids: Tensor) -> Tensor:
        """Those of the weights as stored, computed in float32."""
        return stored(ids.to(args.device))

    every = len(stdlib) // len(held_out)
    last = curve[-1]
    log: dict[str, Any] = {
        "command": f"python -m turboquant.demo.train {shlex.join(sys.argv[1:])}",
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "config": asdict(model.config),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "stdlib_share": STDLIB_SHARE,
        "batch_tokens": args.batch_tokens,
        "steps": last["step"],
        "minutes": last["seconds"] / 60,
        "tokens_per_second": round(last["step"] * args.batch_tokens / last["seconds"]),
        "held_out": [document.name for document in held_out],
        "held_out_figures": evaluate.report(logits, held_out),
        "seen": evaluate.bits_per_byte(logits, stdlib[::every], evaluate.LIMITS[-1]),
        "text": origins,
        "curve": curve[:: math.ceil(len(curve) / 100)],
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (args.out / "MODEL_CARD.md").write_text(model_card(log))
    print(model_card(log))


if __name__ == "__main__":
    main()
