"""Textual inversions: every layout, images against diffusers, and those bundled in LoRA files."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypergen.models import loading
from tests.support.compare_with_diffusers import assert_same, common_arguments, stock_pipeline
from tests.support.lora_files import save_lora
from tests.support.small_models import save_flux, save_refiner, save_sdxl
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_WIDTH = 32  # of the small SD's text encoder


def _vectors(count: int, width: int = _WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def _write(file: Path, layout: str) -> None:
    """The same three vectors in each layout."""
    vectors = _vectors(3)
    notes = {"string_to_token": {"*": 265}, "name": "x", "step": 500, "sd_checkpoint": None}
    match layout:
        case "kohya":
            save_file({"emb_params": vectors}, file)
        case "diffusers":
            save_file({"<any-name>": vectors}, file)
        case "A1111":
            torch.save({**notes, "string_to_param": {"*": vectors}, "sd_checkpoint_name": "model"}, file)
        case "A1111, parameter":
            torch.save({**notes, "string_to_param": {"*": torch.nn.Parameter(vectors)}}, file)
        case "diffusers, pickle":
            torch.save(OrderedDict({"<any-name>": vectors}), file)
        case _:
            torch.save(vectors, file)


_LAYOUTS = {
    "kohya": ".safetensors",
    "diffusers": ".safetensors",
    "A1111": ".pt",
    "A1111, parameter": ".pt",
    "diffusers, pickle": ".bin",
    "tensor": ".pt",
}


def _embeds(family: Any, prompt: str, loras: Any = ()) -> Tensor:
    with torch.inference_mode():
        return family.encode_prompts(make_request(prompt=prompt), loras).positive.encoder_hidden_states


@pytest.mark.parametrize(("layout", "suffix"), _LAYOUTS.items())
def test_every_layout_is_read(sd_folder: Path, tmp_path: Path, layout: str, suffix: str) -> None:
    _write(tmp_path / "kohya.safetensors", "kohya")
    _write(tmp_path / f"file{suffix}", layout)
    family: Any = loading.load(
        sd_folder,
        make_settings(
            embedding={"one": str(tmp_path / "kohya.safetensors"), "two": str(tmp_path / f"file{suffix}")}
        ),
    )
    assert torch.equal(_embeds(family, "a one cat"), _embeds(family, "a two cat"))
    assert not torch.equal(_embeds(family, "a one cat"), _embeds(family, "a three cat"))


@pytest.mark.parametrize("count", [1, 3])
def test_an_image_equals_that_of_diffusers(sd_folder: Path, tmp_path: Path, count: int) -> None:
    file = tmp_path / "cat.safetensors"
    save_file({"<cat-toy>": _vectors(count)}, file)
    family = loading.load(sd_folder, make_settings(embedding={"<cat-toy>": str(file)}))
    stock: Any = stock_pipeline(StableDiffusionPipeline, sd_folder, safety_checker=None)
    stock.load_textual_inversion(str(file))
    request = make_request(prompt="a <cat-toy>, small", negative_prompt="<cat-toy> dog")
    ours = generate_alone(family, request)
    assert_same(
        ours,
        np.asarray(
            stock(
                request.prompt, negative_prompt=request.negative_prompt, **common_arguments(request)
            ).images[0]
        ),
    )
    plain = loading.load(sd_folder, make_settings())
    assert (generate_alone(plain, request) != ours).any()


def test_an_image_of_sdxl_equals_that_of_diffusers(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "model")
    file = tmp_path / "style.safetensors"
    state = {"clip_l": _vectors(2, 32, 1), "clip_g": _vectors(2, 48, 2)}
    save_file(state, file)
    family = loading.load(folder, make_settings(embedding={"style": str(file)}))
    stock: Any = stock_pipeline(StableDiffusionXLPipeline, folder)
    for part, number in (("clip_l", ""), ("clip_g", "_2")):
        stock.load_textual_inversion(
            {"style": state[part]},
            tokenizer=getattr(stock, f"tokenizer{number}"),
            text_encoder=getattr(stock, f"text_encoder{number}"),
        )
    request = make_request(prompt="in style of a cat", width=128, height=128)
    assert_same(
        generate_alone(family, request),
        np.asarray(stock(request.prompt, **common_arguments(request)).images[0]),
    )


@pytest.mark.parametrize(("width", "tokens"), [(48, 2), (56, 5)])
def test_a_refiner_with_the_second_text_encoder_uses_its_vectors(
    tmp_path: Path, width: int, tokens: int
) -> None:
    folder = save_sdxl(tmp_path / "model")
    refiner = save_refiner(tmp_path / "refiner", folder, width)
    save_file({"clip_l": _vectors(2, 32), "clip_g": _vectors(2, 48)}, tmp_path / "style.safetensors")
    lora = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(32, 1, 1, 1),
        "bundle_emb.other.clip_l": _vectors(2, 32),
        "bundle_emb.other.clip_g": _vectors(2, 48),
    }
    save_file(lora, tmp_path / "ink.safetensors")
    family: Any = loading.load(
        folder,
        make_settings(
            refiner=str(refiner),
            embedding={"style": str(tmp_path / "style.safetensors")},
            lora_dir=[str(tmp_path)],
        ),
    )
    loras = family.lora_manager.load((("ink", 1.0),))
    for name in ("style", "other"):
        prompts = family.encode_prompts(make_request(prompt=name, enable_refiner=True), loras)
        assert prompts.tokens == 2
        assert prompts.refiner.tokens == tokens


def test_a_weight_applies_to_all_vectors(sd_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"emb_params": _vectors(3)}, file)
    family: Any = loading.load(
        sd_folder, make_settings(embedding={"style": str(file)}, prompt_weighting=True)
    )
    plain, weighted = _embeds(family, "a style b"), _embeds(family, "a (style:1.5) b")
    changed = (plain != weighted).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]


def test_a_bundled_embedding_is_active_with_its_lora_alone(
    sd_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    (tmp_path / "loras").mkdir()
    lora = save_lora(tmp_path / "loras" / "ink.safetensors", pipeline)
    single = tmp_path / "style.safetensors"
    save_file({"emb_params": _vectors(2, seed=5)}, single)
    bundled = {
        "bundle_emb.style.string_to_param.*": _vectors(3),
        "bundle_emb.other.emb_params": _vectors(1),
        "bundle_emb.plain": _vectors(1),
        "bundle_emb.output.clip_l_out": _vectors(1),  # left out with a line in the log
    }
    save_file({**load_file(lora), **bundled}, lora)
    family: Any = loading.load(
        sd_folder, make_settings(lora_dir=[str(lora.parent)], embedding={"style": str(single)})
    )
    plain: Any = loading.load(sd_folder, make_settings(lora_dir=[str(lora.parent)]))
    base, ink = make_request(prompt="a style cat"), make_request(prompt="a style cat", loras=(("ink", 1.0),))
    other = make_request(prompt="an other cat")
    engine = InlineEngine(family)
    engine.run(base, ink, other)  # interleaved with the LoRA's
    for request, of in ((base, family), (ink, plain), (other, plain)):
        alone = InlineEngine(of)
        alone.run(request)
        assert alone.data(request) == engine.data(request)
    loras = family.lora_manager.load((("ink", 1.0),))
    assert loras[0][0].embeddings.keys() == {"style", "other", "plain"}
    assert "Left out the embeddings of a LoRA: output." in caplog.text
    tokens = [family.encode_prompts(make_request(prompt="style"), own).tokens for own in ((), loras)]
    assert tokens == [2, 3]


def test_flux_leaves_bundled_embeddings_out_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_flux(tmp_path / "model")
    width = loading.load(folder, make_settings()).denoiser.x_embedder.out_features
    save_file(
        {
            "transformer.x_embedder.lora_A.weight": torch.ones(1, 16),
            "transformer.x_embedder.lora_B.weight": torch.ones(width, 1),
            "bundle_emb.style.clip_l": _vectors(1),
        },
        tmp_path / "ink.safetensors",
    )
    family: Any = loading.load(folder, make_settings(lora=[f"ink={tmp_path / 'ink.safetensors'}"]))
    [(lora, _)] = family.lora_manager.load((("ink", 1.0),))
    assert "Left out the embeddings of a LoRA: style." in caplog.text
    assert lora.embeddings == {}
    assert len(lora.layers) == 1
