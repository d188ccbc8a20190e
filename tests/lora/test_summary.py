"""What the header of a LoRA file shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypergen.errors import ModelError
from hypergen.lora.summary import LoraSummary, summarise
from tests.support.lora_forms import Layout, write
from tests.support.lora_layouts import LAYOUTS
from tests.support.lora_networks import MODELS


def _file(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("shapes", "model", "layout", "ranks"),
    [
        ({"unet.d.attn2.to_k.lora_A.weight": [8, 768]}, "sd 1.x", "diffusers", (8,)),
        ({"unet.d.attn2.processor.to_k_lora.down.weight": [4, 1024]}, "sd 2.x", "diffusers", (4,)),
        (
            {
                "lora_unet_d_attn2_to_k.lora_down.weight": [16, 2048],
                "lora_te1_x.lora_down.weight": [8, 768],
                "lora_te1_x.alpha": [],
            },
            "sdxl",
            "kohya",
            (8, 16),
        ),
        ({"lora_unet_d_attn2_to_k.hada_w1_b": [6, 2048]}, "sdxl", "kohya", (6,)),
        (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": [4, 3072]},
            "flux",
            "diffusers",
            (4,),
        ),
        ({"lora_unet_double_blocks_0_x.lora_down.weight": [4, 9]}, "flux", "kohya", (4,)),
        ({"diffusion_model.input_blocks.1.0.x.diff": [4, 9]}, "sd or sdxl", "comfyui", ()),
        ({"lora_te_text_model_x.lora_down.weight": [4, 9]}, "text encoder", "kohya", (4,)),
        ({"transformer.x.lora_A.weight": [4, 9]}, "transformer", "diffusers", (4,)),
    ],
)
def test_a_header_shows_model_layout_and_ranks(
    tmp_path: Path, shapes: dict[str, list[int]], model: str, layout: str, ranks: tuple[int, ...]
) -> None:
    found = summarise(_file(tmp_path / "a.safetensors", shapes))
    assert (found.model, found.layout, found.ranks) == (model, layout, ranks)


def test_metadata_and_bundled_embeddings_are_shown(tmp_path: Path) -> None:
    frequencies = {
        "1_cat": {"cat": 3, "a\x1b[31m dog": 9},
        "2_other": {"cat": 7, **{f"t{n}": 1 for n in range(20)}},
    }
    metadata = {
        "ss_base_model_version": "sd_v2",
        "ss_tag_frequency": json.dumps(frequencies),
    }
    shapes = {
        "lora_unet_x.lora_down.weight": [4, 2],
        "lora_unet_x.lora_up.weight": [2, 4],
        "lora_unet_x.alpha": [],
        "lora_unet_y.lora_down.weight": [4, 2],
        "lora_unet_y.dora_scale": [2, 1],
        "bundle_emb.style.emb_params": [2, 1024],
    }
    found = summarise(_file(tmp_path / "a.safetensors", shapes, metadata))
    assert found == LoraSummary(
        model="sd 2.x",
        layout="kohya",
        methods=("LoRA", "DoRA"),
        layers=2,
        ranks=(4,),
        embeddings=("style",),
        trigger_words=("cat", "a[31m dog", *(f"t{n}" for n in range(8))),
        size_bytes=(tmp_path / "a.safetensors").stat().st_size,
    )


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "ink lines, b&w,"}, ("ink lines", "b&w")),
        ({"modelspec.trigger_phrase": "x" * 500}, ("x" * 100,)),
        ({"modelspec.trigger_phrase": ",".join(map(str, range(50)))}, tuple(map(str, range(10)))),
        ({"ss_tag_frequency": "not JSON"}, ()),
        ({"ss_tag_frequency": "[1]"}, ()),
        ({"ss_tag_frequency": '{"a": {"b": "many", "c": 1}}'}, ()),
        ({}, ()),
    ],
)
def test_trigger_words_are_few_and_short(
    tmp_path: Path, metadata: dict[str, str], words: tuple[str, ...]
) -> None:
    file = _file(tmp_path / "a.safetensors", {"unet.x.lora_A.weight": [1, 2]}, metadata)
    assert summarise(file).trigger_words == words


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_is_recognised(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    write(layout, file, MODELS[layout.model][0]())
    found = summarise(file)
    # The widths of the small SDXL are those of no published model.
    assert found.model in (
        {"flux", "transformer"} if layout.model == "flux" else {"sd", "sdxl", "sd or sdxl"}
    )
    assert found.methods
    assert found.layers >= len(layout.layers)
    save_file({**load_file(file), "an extra tensor": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="'an extra tensor' is no part of a LoRA in a known layout"):
        summarise(file)


def test_a_file_that_is_no_lora_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no LoRA layers"):
        summarise(_file(tmp_path / "b.safetensors", {"unet.conv_in.weight": [1]}))
    (tmp_path / "c.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="damaged"):
        summarise(tmp_path / "c.safetensors")


def test_torch_is_not_imported() -> None:
    code = "import hypergen.lora.summary, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
