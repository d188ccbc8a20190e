"""Prompt weighting: parsing, the effect on images, and prompts that must not change."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.errors import SettingError
from hypergen.models import loading
from hypergen.models.text_encoders.prompt_tokens import chunk_tokens
from hypergen.models.text_encoders.prompt_weighting import parse_weights, token_weights
from tests.support.compare_with_diffusers import (
    CHUNK,
    assert_same,
    common_arguments,
    generate_one_at_a_time,
    stock_pipeline,
)
from tests.support.small_models import save_flux, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings, prepare_image

_REQUEST = make_request(prompt="a cat", negative_prompt="(blurred:1.2)", num_inference_steps=3)


def _parts(prompt: str) -> list[tuple[str, float]]:
    parsed = parse_weights(prompt)
    weights = [round(parsed.weight_at(index), 4) for index in range(len(parsed.text))]
    grouped = groupby(zip(parsed.text, weights, strict=True), key=lambda pair: pair[1])
    return [("".join(letter for letter, _ in pairs), weight) for weight, pairs in grouped]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (cat:1.3) sat", [("a ", 1), ("cat", 1.3), (" sat", 1)]),
        ("(cat)[dog]", [("cat", 1.1), ("dog", 0.9091)]),
        ("((cat)) (a (b:1.5) c:2)", [("cat", 1.21), (" ", 1), ("a ", 2), ("b", 3), (" c", 2)]),
        ("(cat: .5 )(dog:0)", [("cat", 0.5), ("dog", 0)]),
        ("(cat:9999) " + "(" * 30 + "dog" + ")" * 30, [("cat", 10), (" ", 1), ("dog", 10)]),
        # Escaped, unmatched, or not a number: text.
        (r"\(cat\) \[dog\] a\\b a\b", [(r"(cat) [dog] a\b a\b", 1)]),
        (":( :) (cat", [(":", 1), (" :", 1.1), (" (cat", 1)]),
        ("cat) dog]", [("cat) dog]", 1)]),
        ("([cat) dog", [("[cat", 1.1), (" dog", 1)]),
        ("(a:b) (a:-1) 3:4", [("a:b", 1.1), (" ", 1), ("a:-1", 1.1), (" 3:4", 1)]),
        ("[cat:1.3]", [("cat:1.3", 0.9091)]),
    ],
)
def test_marks_are_parsed_as_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert _parts(prompt) == parts


def test_a_prompt_of_brackets_is_parsed_quickly() -> None:
    started = time.process_time()
    for prompt in (
        "(" * 16000 + ")" * 16000,
        "[" * 16000 + ")" * 16000,
        "([" * 16000,
        ":" * 32000,
        "(: " * 10000,
    ):
        parse_weights(prompt)
    assert time.process_time() - started < 2


@pytest.fixture(scope="module")
def stock(sd_folder: Path) -> Any:
    return stock_pipeline(StableDiffusionPipeline, sd_folder, safety_checker=None)


@pytest.fixture(scope="module")
def family(sd_folder: Path) -> Any:
    return loading.load(sd_folder, make_settings(prompt_weighting=True))


def test_a_weighted_word_is_scaled_away_from_the_empty_prompt(stock: Any, family: Any) -> None:
    """Compared with diffusers on embeddings that are weighted by hand."""
    request = replace(_REQUEST, prompt="a (cat:1.5) sat [down]", negative_prompt=None)
    plain, empty = (stock.encode_prompt(text, "cpu", 1, True)[0] for text in ("a cat sat down", ""))
    # The tokenizer of small models has one token per letter.
    letters = stock.tokenizer("a cat sat down", add_special_tokens=False).input_ids
    assert len(letters) == 11
    weights = torch.tensor([1.0, *[1.0], *[1.5] * 3, *[1.0] * 3, *[1 / 1.1] * 4, *[1.0] * 65])[None, :, None]
    assert weights.shape[1] == 77
    with torch.no_grad():
        embeds = empty + weights * (plain - empty)
        image = stock(prompt_embeds=embeds, negative_prompt_embeds=empty, **common_arguments(request)).images[
            0
        ]
    assert_same(generate_alone(family, request), np.asarray(image))
    assert (
        generate_alone(family, request) != generate_alone(family, replace(request, prompt="a cat sat down"))
    ).any()


def test_weights_of_one_and_escapes_change_no_byte(sd_folder: Path, family: Any) -> None:
    plain = loading.load(sd_folder, make_settings())
    for marked, bare in (
        ("a (cat:1.0) sat", "a cat sat"),
        ("(un:1)happy", "unhappy"),
        (r"a \(cat\)", "a (cat)"),
        (f"{CHUNK} (a cat:1.00)", f"{CHUNK} a cat"),
    ):
        image = generate_alone(family, replace(_REQUEST, prompt=marked, negative_prompt=None))
        assert (image == generate_alone(plain, replace(_REQUEST, prompt=bare, negative_prompt=None))).all()


def test_marks_are_text_without_the_setting(sd_folder: Path) -> None:
    plain = loading.load(sd_folder, make_settings())
    with torch.inference_mode():
        marked, bare = (prepare_image(plain, replace(_REQUEST, prompt=p)) for p in ("a (cat:1.0)", "a cat"))
    assert marked.prompt_tokens == bare.prompt_tokens + len("(:1.0)")
    assert not torch.equal(marked.positive.encoder_hidden_states, bare.positive.encoder_hidden_states)


def test_weighted_prompts_of_any_length_share_batches_and_keep_their_bytes(family: Any) -> None:
    requests = [
        _REQUEST,
        replace(_REQUEST, id="weighted", prompt="a (cat:1.4)"),
        replace(_REQUEST, id="long", prompt=f"(a cat:1.4) {CHUNK} [a dog]"),
        replace(_REQUEST, id="long too", prompt=f"{CHUNK} (a dog:0.2)", seed=3),
    ]
    alone, batched = generate_one_at_a_time(family, requests), InlineEngine(family)
    batched.probe_shapes(*requests)
    batched.run(*requests)
    for request in requests:
        assert batched.data(request) == alone.data(request)
        assert batched.images[request.id][0].shared_forwards > 0


def test_a_word_in_a_later_chunk_is_weighted(stock: Any) -> None:
    parsed = parse_weights(f"{CHUNK} a (dog:2) sat")
    weights = token_weights(parsed, chunk_tokens(stock.tokenizer, parsed.text, 2)[0])
    assert (weights[0] == 1).all()
    assert weights[1, :9].tolist() == [1, 1, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("save", [save_sdxl, save_sd3])
def test_models_with_several_encoders_apply_weights_in_clip(save: Any, tmp_path: Path) -> None:
    family: Any = loading.load(save(tmp_path / "model"), make_settings(prompt_weighting=True))
    with torch.inference_mode():
        inputs = {
            prompt: prepare_image(family, replace(_REQUEST, prompt=prompt, negative_prompt=None)).positive
            for prompt in ("a cat", "a (cat:1.0)", "a (cat:1.5)")
        }
    plain, one, more = inputs.values()
    others = {name for name, tensor in vars(plain).items() if tensor is not None} - {"encoder_hidden_states"}
    assert torch.equal(plain.encoder_hidden_states, one.encoder_hidden_states)
    assert all(torch.equal(getattr(plain, name), getattr(one, name)) for name in others)
    changed = (plain.encoder_hidden_states != more.encoder_hidden_states).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]  # the start, "a", then the letters of "cat"
    assert all(torch.equal(getattr(plain, name), getattr(more, name)) for name in others)


def test_models_without_clip_token_embeddings_reject_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="prompt_weighting is only supported for sd, sd3, sdxl models; this is flux"
    ):
        loading.load(save_flux(tmp_path / "flux"), make_settings(prompt_weighting=True))
