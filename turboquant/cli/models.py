"""Loading a model for the command line; whatever is wrong with it becomes one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboquant import ops
from turboquant.cli import terminal
from turboquant.cli.errors import UserError, first_paragraph

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32")
_REACHABLE_S = 5.0
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "tekken.json")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or a hub id, and whether only local files count."""

    name: str
    local: bool


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' chatter off the terminal, except for the progress of downloads.

    Raises:
        UserError: transformers is not there, or too old.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError('this needs transformers: pip install "turboquant-tq4[demo]"') from None
    try:
        import turboquant.hf  # noqa: F401
    except ImportError as error:  # too old
        raise UserError(str(error)) from None
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as log

    before = log.get_verbosity(), hub.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub.set_verbosity_error()
    log.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enable_progress_bars()
        try:
            yield
        finally:
            log.set_verbosity(before[0])
            hub.set_verbosity(before[1])
            if before[2]:
                log.enable_progress_bar()


def locate(name: str) -> Source:
    """A folder if there is one of that name, else an id on the hub.

    Raises:
        UserError: neither is possible.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model folder: it holds no config.json")
        return Source(str(path), local=True)
    if path.exists():
        raise UserError(f"{name} is a file; name the folder of the model")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name}")
    return Source(name, local=not _hub_reachable())


def _hub_reachable() -> bool:
    """One attempt: the hub's client would try for minutes, for every file anew."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_REACHABLE_S)
    except Exception:  # of whatever HTTP library the client uses; offline mode has its own
        return False
    return True


def load_config(source: Source) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.name, **_options(source))
    except Exception as error:  # whatever a foreign file can cause
        raise _load_error(source, error) from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(source.name)
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        # Some versions of transformers would make one up, with next to no tokens.
        raise UserError(f"{source.name} holds no tokenizer: save the model's beside it")
    try:
        return AutoTokenizer.from_pretrained(source.name, **_options(source))
    except Exception as error:
        raise _load_error(source, error, "the tokenizer of ") from error


def load_weights(
    source: Source, config: PretrainedConfig, dtype: str, device: torch.device
) -> PreTrainedModel:
    """The model in eval mode.

    Args:
        dtype: one of DTYPES; `"auto"` is the one that the weights are stored in.

    Raises:
        UserError: a weight file is missing, damaged, incomplete or for another model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with terminal.status(f"loading {source.name}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.name,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_options(source),
            )
            model, found = loaded[0].to(device).eval(), loaded[1]
        # transformers would put random numbers in their place, and generate nonsense.
        if names := sorted(found["missing_keys"]):
            raise ValueError(f"{len(names)} missing, such as {names[0]}")
        if names := sorted(name for name, *_ in found["mismatched_keys"]):
            raise ValueError(f"{len(names)} of the wrong shape, such as {names[0]}")
        return model
    except torch.OutOfMemoryError:
        raise UserError(
            f"{source.name} does not fit the memory of {device}; try --device cpu"
        ) from None
    except Exception as error:
        raise _load_error(source, error, "the weights of ") from error


def refuse_unsupported(config: PretrainedConfig) -> None:
    """
    Raises:
        UserError: the model's cache cannot be stored in 4 bits; with the reason.
    """
    from turboquant.hf import diagnose

    report = diagnose(config)
    if report.refusal is not None:
        raise UserError(
            f"no 4-bit cache for a {report.model_type} model: {report.refusal}; try --cache dense"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that the model can look back on; None if its config sets no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text."""
    ids: Any = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def pick_device(name: str | None, needs_kernels: bool) -> torch.device:
    """The device of that name; None is a GPU that has our kernels, if there is one, else the CPU.

    Raises:
        UserError: there is no such device, or no kernels for it though they are needed.
    """
    if name is None:
        return torch.device("cuda" if ops.HAS_CUDA and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # "meta" holds no numbers, and fails too
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"cannot use device {name!r} ({first_paragraph(error)}); "
            "try --device cpu, or see turboquant info"
        ) from None
    if needs_kernels and device.type == "cuda" and not ops.HAS_CUDA:
        raise UserError(
            f"this installation has no CUDA kernels; reinstall with {ops.INSTALL_WITH_CUDA}, "
            "or use --device cpu"
        )
    return device


def _options(source: Source) -> dict[str, Any]:
    return {"local_files_only": source.local, "trust_remote_code": False}


def _load_error(source: Source, error: Exception, what: str = "") -> UserError:
    if source.local and not Path(source.name).is_dir():
        return UserError(
            f"cannot load {source.name}: there is no such folder, the hub cannot be reached, and "
            "the local cache lacks it; check the name or the network"
        )
    why = first_paragraph(error).rstrip(".")
    advice = "; check that its files are complete" if what else ""
    return UserError(f"cannot load {what}{source.name}: {why}{advice}")
