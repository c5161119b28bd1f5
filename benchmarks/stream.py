"""The yardstick: a kernel that reads memory as fast as it can and keeps only a sum.

Each program walks over blocks of the buffer; a thread loads 16 bytes at a time, and a block is so
large that every thread has several loads in flight.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Config(NamedTuple):
    block: int  # of int32 words
    warps: int
    per_sm: int  # programs

    def __str__(self) -> str:
        return f"{self.block} words, {self.warps} warps, {self.per_sm} programs an SM"


CONFIGS = [
    Config(512, 4, 16),
    Config(1024, 4, 16),
    Config(2048, 4, 8),
    Config(4096, 4, 4),
    Config(4096, 8, 4),
    Config(4096, 8, 8),
    Config(8192, 8, 2),
    Config(8192, 8, 4),
]


@triton.jit
def _read(data, sums, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    inside = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(program * BLOCK, words, tl.num_programs(0) * BLOCK):
        at = start + inside
        total += tl.load(data + at, mask=at < words, other=0, eviction_policy="evict_first")
    tl.store(sums + program, tl.sum(total, axis=0))


def read(data: torch.Tensor, config: Config) -> torch.Tensor:
    """Read contiguous int32 data; the sum of what each program read."""
    sms = torch.cuda.get_device_properties(data.device).multi_processor_count
    programs = min(config.per_sm * sms, triton.cdiv(data.numel(), config.block))
    sums = torch.empty(programs, dtype=torch.int32, device=data.device)
    _read[(programs,)](data, sums, data.numel(), BLOCK=config.block, num_warps=config.warps)
    return sums
