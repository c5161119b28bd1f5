"""The model card, written from the training log so that its figures cannot drift from it."""

from __future__ import annotations

from typing import Any

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# turboquant demo model

A byte-level Llama that continues Python source: {parameters:,} parameters,
{config[num_hidden_layers]} layers of width {config[hidden_size]},
{config[num_attention_heads]} query and {config[num_key_value_heads]} KV heads
of {config[head_dim]}, context {config[max_position_embeddings]}.

It exists so that `turboquant demo` can show a 4-bit KV cache at work on real text without a
download. It knows the look of Python rather than its meaning: use it for nothing else. Token ids
are bytes; 256, `<|endoftext|>`, stands before and after a document.

## Data
Python source found on the training machine, {megabytes:.0f} MB in all:
the standard library of CPython {python} in {stdlib_share:.0%} of the windows,
otherwise {packages} installed packages whose metadata states a permissive licence (MIT, BSD,
Apache-2.0 and the like), without tests and vendored code. `training_log.json` lists each with its
version and licence. None of that text is part of this package.

Held out are {held_out_figures[files]} standard library files, chosen by a hash of their path.
Whatever shares more than 512 bytes with them was not learned from either (files: {dropped}).

## Measured
Bits per byte over the {held_out_figures[bytes]:,} bytes of the held-out files, by the weights as
stored here. The model reads each file from its start and never sees more than its context; `xz`
compresses the files one by one, or joined to one.

| what | bits per byte |
|---|---|
{rows}

The same number of standard library files that it did learn from: {seen:.3f} at the longest context.
`python -m turboquant.demo.evaluate` measures again, on the files of the Python at hand.

## Reproduce
    {command}

on a machine with the packages that the log lists.
Here: {steps:,} steps of {batch_tokens:,} tokens in {minutes:.1f} minutes,
{tokens_per_second:,} tokens a second on one {device}, torch {torch}, seed {seed}.
Other versions of the text, and a budget in minutes, give a model as good, but not the same bits.
"""


def model_card(log: dict[str, Any]) -> str:
    """The text of MODEL_CARD.md for a training log."""
    figures = {k: v for k, v in log["held_out_figures"].items() if k not in ("files", "bytes")}
    return _CARD.format(
        **log,
        megabytes=sum(origin["bytes"] for origin in log["text"]) / 1e6,
        packages=len(log["text"]) - 1,
        dropped=sum(origin["dropped"] for origin in log["text"]),
        rows="\n".join(f"| {name} | {bits:.3f} |" for name, bits in figures.items()),
    )
