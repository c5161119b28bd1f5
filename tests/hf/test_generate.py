"""``generate()`` on the packed cache gives what it gives on the oracle cache."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.generation import CompileConfig

from turboquant.hf import TurboQuantCache, UnsupportedError, enable, enabled

from .tiny import FAMILIES, VOCAB, case, generate, oracle_cache, tiny_model

KINDS = pytest.mark.parametrize("max_cache_len", [None, 64], ids=["dynamic", "static"])


@KINDS
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy(
    family: str, head_dim: int, dtype: torch.dtype, rows: int, max_cache_len: int | None
) -> None:
    # In bf16 one layer: in a second one, the roundings of the first lift some coordinates over the
    # edge of their level. test_forward.py looks at deep bf16 models layer by layer.
    layers = 2 if dtype == torch.float32 else 1
    oracle = case(family, rows, dtype, head_dim=head_dim, num_hidden_layers=layers)
    with enabled(oracle.model, max_cache_len=max_cache_len):
        oracle.check(*generate(oracle.model, oracle.ids, oracle.mask))


@KINDS
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "temperature": 1.5, "top_k": 40}, {"num_beams": 3}],
    ids=["sampling", "beams"],
)
def test_other_modes(options: dict[str, Any], max_cache_len: int | None) -> None:
    # One layer: its keys have equal bits on both sides, so close calls go the same way.
    oracle = case("llama", 3, num_hidden_layers=1)
    model, prompt = oracle.model, (oracle.ids, oracle.mask)
    torch.manual_seed(3)
    cache = oracle_cache(model.config)
    want, want_logits = generate(model, *prompt, past_key_values=cache, **options)
    assert min(len(set(row)) for row in want.tolist()) >= 8
    assert len({tuple(row) for row in want.tolist()}) == 3
    assert not torch.equal(want, oracle.tokens)
    torch.manual_seed(3)
    with enabled(model, max_cache_len=max_cache_len):
        tokens, logits = generate(model, *prompt, **options)
    assert torch.equal(tokens, want)
    assert (logits - want_logits).abs().max() <= oracle.atol


@KINDS
def test_chunked_prefill(max_cache_len: int | None) -> None:
    oracle = case("llama", 3)
    with enabled(oracle.model, max_cache_len=max_cache_len):
        oracle.check(*generate(oracle.model, oracle.ids, oracle.mask, prefill_chunk_size=4))


@KINDS
@pytest.mark.parametrize("given", ["everything", "new tokens only"])
def test_continuation(given: str, max_cache_len: int | None) -> None:
    oracle = case("qwen3", 3)
    model, mask = oracle.model, oracle.mask
    with enabled(model):
        cache = TurboQuantCache(model, max_cache_len)
        first, first_logits = generate(model, oracle.ids, mask, 5, past_key_values=cache)
        ids = torch.cat((oracle.ids, first), dim=1) if given == "everything" else first[:, -1:]
        mask = torch.cat((mask, torch.ones_like(first)), dim=1)
        rest, rest_logits = generate(model, ids, mask, 7, past_key_values=cache)
    oracle.check(torch.cat((first, rest), 1), torch.cat((first_logits, rest_logits), 1))


@KINDS
def test_prompt_after_a_prefix(max_cache_len: int | None) -> None:
    """Several new tokens at the end of a filled cache: the lower-right causal rule."""
    oracle = case("llama", 3)
    model, ids, mask = oracle.model, oracle.ids, oracle.mask
    with enabled(model), torch.no_grad():
        cache = TurboQuantCache(model, max_cache_len)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        model(
            ids[:, :4],
            attention_mask=mask[:, :4],
            position_ids=position_ids[:, :4],
            past_key_values=cache,
        )
        oracle.check(*generate(model, ids, mask, past_key_values=cache))


@KINDS
def test_one_prompt_and_several_continuations(max_cache_len: int | None) -> None:
    """A prompt is computed once; each continuation gets a copy of its cache."""
    oracle = case("qwen3", 3)
    model, ids, mask = oracle.model, oracle.ids, oracle.mask
    with enabled(model), torch.no_grad():
        prompt = TurboQuantCache(model, max_cache_len)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, :9]
        model(ids[:, :9], attention_mask=mask[:, :9], position_ids=position_ids,
              past_key_values=prompt)  # fmt: skip
        for _ in range(2):
            oracle.check(*generate(model, ids, mask, past_key_values=copy.deepcopy(prompt)))
        assert int(prompt.get_seq_length()) == 9
        # Through a file, too: the prompt of another process.
        file = io.BytesIO()
        torch.save(prompt, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        oracle.check(*generate(model, ids, mask, past_key_values=again))


def test_assisted_generation_in_part_dense_and_static_is_refused() -> None:
    """A static layer of transformers cannot take tokens back."""
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.ones(1, 5, dtype=torch.long)
    enable(model, max_cache_len=64, skip_layers=[1])
    with pytest.raises(UnsupportedError, match="make a dynamic cache"):
        generate(model, ids, torch.ones_like(ids), assistant_model=assistant)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_an_enabled_hybrid_assistant(name: str) -> None:
    """Its sliding windows and states are put back too."""
    if name == "gemma3" and transformers.__version__.startswith("5.16."):
        pytest.skip("this version fails with its own cache, too")
    oracle = case("llama", 1)
    model_type, options = FAMILIES[name]
    assistant = tiny_model(model_type, seed=2, **options)
    with enabled(oracle.model), enabled(assistant):
        oracle.check(*generate(oracle.model, oracle.ids, oracle.mask, assistant_model=assistant))


@pytest.mark.parametrize("length", [10, 17])
@KINDS
def test_phi3_keeps_its_cache(length: int, max_cache_len: int | None) -> None:
    """Behind its original context it computes all keys anew, not into a dense cache."""
    if length == 10 and transformers.__version__.startswith("5.16."):
        pytest.skip("this version forgets the context with its own cache, too")
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    model = tiny_model(
        "phi3", num_hidden_layers=1, head_dim=32, max_position_embeddings=64,
        original_max_position_embeddings=16, rope_parameters={**rope, **factors},
    )  # fmt: skip
    ids = torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))

    with enabled(model, max_cache_len=max_cache_len), torch.no_grad():
        out = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        for step in (0, 7):
            told = out.sequences[:, : length + step]
            want = model(told, past_key_values=TurboQuantCache(model)).logits[:, -1]
            torch.testing.assert_close(out.logits[step], want, rtol=0, atol=1e-3 * want.std())
    assert type(out.past_key_values) is TurboQuantCache
    assert int(out.past_key_values.get_seq_length()) == length + 7


def test_a_full_static_cache_is_found_before_it_starts() -> None:
    model = tiny_model("llama")
    ids = torch.randint(2, VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))
    with enabled(model):
        cache = TurboQuantCache(model, 20)
        first, _ = generate(model, ids, torch.ones_like(ids), 5, past_key_values=cache)
        everything = torch.cat((ids, first), dim=1)
        for given in (everything, first[:, -1:]):
            with pytest.raises(UnsupportedError, match="26 tokens do not fit"):
                generate(model, given, torch.ones_like(everything), 12, past_key_values=cache)
        assert int(cache.get_seq_length()) == 14
        generate(model, first[:, -1:], torch.ones_like(everything), 6, past_key_values=cache)


@pytest.mark.parametrize("options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}])
def test_modes_that_are_refused(options: dict[str, Any]) -> None:
    oracle = case("llama", 1)
    with enabled(oracle.model), pytest.raises((UnsupportedError, ValueError)):
        generate(oracle.model, oracle.ids, oracle.mask, **options)


def test_a_pipeline() -> None:
    """Through the high-level interface, in batches, and the same as without it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", padding_side="left"
    )
    oracle = case("llama", 3)
    texts = [
        " ".join(f"w{i}" for i in row[keep.bool()].tolist())
        for row, keep in zip(oracle.ids, oracle.mask)
    ]
    with enabled(oracle.model):
        pipe = pipeline("text-generation", model=oracle.model, tokenizer=tokenizer, device="cpu")
        results = pipe(texts, max_new_tokens=12, do_sample=False, batch_size=3, return_tensors=True)
    tokens = [result[0]["generated_token_ids"][-12:] for result in results]
    assert torch.equal(torch.tensor(tokens), oracle.tokens)


@KINDS
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted(how: str, max_cache_len: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are verified many rows at a time, and the rejected ones are cropped away."""
    oracle = case("llama", 1)
    removed = []
    crop = TurboQuantCache.crop

    def spy(self: TurboQuantCache, tokens: Any) -> None:
        before = int(self.get_seq_length())
        crop(self, tokens)
        removed.append(before - int(self.get_seq_length()))

    monkeypatch.setattr(TurboQuantCache, "crop", spy)
    # Single tokens of the prompt, so that there is often something to look up.
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if how == "assistant":
        options = {"assistant_model": tiny_model("llama", seed=1)}
    with enabled(oracle.model, max_cache_len=max_cache_len):
        oracle.check(*generate(oracle.model, oracle.ids, oracle.mask, **options))
    assert max(removed) > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_static_decoding_compiles_into_one_graph(name: str) -> None:
    model_type, options = FAMILIES[name]
    oracle = case(model_type, 3, **options)
    model, ids, mask = oracle.model, oracle.ids, oracle.mask
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with enabled(model, max_cache_len=64):
        step = torch.compile(model.forward, fullgraph=True, backend=backend)
        cache = TurboQuantCache(model, 64)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
        tokens, logits = [], [out.logits[:, -1]]
        for _ in range(oracle.tokens.shape[1]):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = step(
                tokens[-1],
                # Of the whole capacity, so that its shape is the same at every step.
                attention_mask=torch.nn.functional.pad(mask, (0, 64 - mask.shape[1])),
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            logits.append(out.logits[:, -1])
    oracle.check(torch.cat(tokens, 1), torch.stack(logits[:-1], 1))
    assert len(graphs) == 1


def test_generate_compiles_decoding_by_itself() -> None:
    """As it does on CUDA, with masks made outside the graph."""
    oracle = case("llama", 3)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with enabled(oracle.model, max_cache_len=64):
        oracle.check(*generate(oracle.model, oracle.ids, oracle.mask, compile_config=config))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
