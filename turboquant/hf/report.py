"""What becomes of a model's cache, layer by layer: to be read, and to plan memory by."""

from __future__ import annotations

from dataclasses import dataclass

from turboquant.hf.keys import KeyNoise


@dataclass(frozen=True)
class LayerReport:
    """What becomes of one layer's cache.

    Attributes:
        index: position of the layer in the model.
        kind: of attention.
        compressed: stored in 4 bits?
        reason: why not; empty for a compressed layer.
        n_heads: KV heads H; 0 for a layer that stores no keys.
        head_dim: D.
        dense_bytes: of one stored token's keys and values in the model's dtype.
        packed_bytes: of one stored token's keys and values in 4 bits.
        k_offset: are keys stored without what all of them have in common?
        key_noise: of a model with weights whose keys have a bias, or that was asked about: how
            much a part in common enlarges the error of 4 bits.
        window: tokens that it stores at most; None if its cache grows with the context.
        state_bytes: of what does not depend on the context, for a sequence.
    """

    index: int
    kind: str
    compressed: bool
    reason: str
    n_heads: int
    head_dim: int
    dense_bytes: int
    packed_bytes: int
    k_offset: bool = False
    key_noise: KeyNoise | None = None
    window: int | None = None
    state_bytes: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Of a token that it stores, as planned."""
        return self.packed_bytes if self.compressed else self.dense_bytes

    def cache_bytes(self, context: int, *, dense: bool = False) -> int:
        """For a sequence of so many tokens, as planned; or were it dense."""
        stored = context if self.window is None else min(context, self.window)
        return stored * (self.dense_bytes if dense else self.bytes_per_token) + self.state_bytes

    def __str__(self) -> str:
        if not self.n_heads:
            return self.kind
        how = "4-bit" if self.compressed else f"dense, {self.reason}"
        if self.k_offset:
            how += " with a key offset"
        return (
            f"{self.kind}, {how}; {self.n_heads} KV heads of {self.head_dim}, "
            f"{self.bytes_per_token} bytes "
            f"{'a token' if self.window is None else 'for each of its tokens'}"
        )


@dataclass(frozen=True)
class Report:
    """What is compressed, what is not and why. ``print`` it.

    Attributes:
        model_type: as in the config.
        layers: one entry a layer; empty if the model is refused as a whole.
        warnings: known risks to quality or memory.
        refusal: why the model cannot be served at all; None if it can.
    """

    model_type: str
    layers: tuple[LayerReport, ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def compressed(self) -> list[int]:
        """Indices of the layers that are stored in 4 bits."""
        return [layer.index for layer in self.layers if layer.compressed]

    @property
    def dense_bytes(self) -> int:
        """That a token adds to the cache of a long context, were no layer compressed."""
        return sum(layer.dense_bytes for layer in self.layers if layer.window is None)

    @property
    def bytes_per_token(self) -> int:
        """That a token adds to the cache of a long context, as planned here."""
        return sum(layer.bytes_per_token for layer in self.layers if layer.window is None)

    def cache_bytes(self, context: int, batch_size: int = 1, *, dense: bool = False) -> int:
        """Of a cache that is made for so many tokens, as planned; or were no layer compressed."""
        return batch_size * sum(layer.cache_bytes(context, dense=dense) for layer in self.layers)

    def longest_context(self, memory: int, batch_size: int = 1, *, dense: bool = False) -> int:
        """Tokens of each sequence whose cache fits so many bytes; 0 if none does.

        >>> from transformers import LlamaConfig
        >>> from turboquant.hf import diagnose
        >>> report = diagnose(LlamaConfig(dtype="bfloat16"))
        >>> report.longest_context(2**33), report.longest_context(2**33, dense=True)
        (63550, 16384)
        """
        if self.cache_bytes(0, batch_size) > memory:
            return 0
        # Windows fill up at different lengths: search.
        low, high = 0, memory + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.cache_bytes(middle, batch_size, dense=dense) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.model_type}: not supported: {self.refusal}"
        ratio = self.dense_bytes / self.bytes_per_token
        lines = [
            f"{self.model_type}: {len(self.compressed)} of {len(self.layers)} layers in 4 bits, "
            f"{self.bytes_per_token} instead of {self.dense_bytes} bytes a token ({ratio:.2f}x)"
        ]
        alike: dict[str, list[int]] = {}
        for layer in self.layers:
            alike.setdefault(str(layer), []).append(layer.index)
        for text, indices in alike.items():
            lines.append(f"  layer{'s' if len(indices) > 1 else ''} {ranges(indices)}: {text}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def ranges(indices: list[int]) -> str:
    """
    >>> ranges([0, 1, 2, 5, 7, 8]), ranges([3])
    ('0-2, 5, 7-8', '3')
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
