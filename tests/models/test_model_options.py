"""Options of served-model files against diffusers, and configurations that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from safetensors.torch import save_file

from hypergen.denoising.schedulers import SchedulerFactory
from hypergen.model_families import servable
from hypergen.model_store.components import find_vae
from hypergen.model_store.diffusers_layout import PIPELINE_FILE, require_pipeline
from hypergen.model_store.model_arguments import samplers_of
from hypergen.models import loading
from hypergen.models.model_options import with_options
from hypergen.request import GenerationRequest
from hypergen.served_model_config import ModelEntry, ModelOptions, read_entries
from tests.support.checkpoint_layouts import with_fields
from tests.support.compare_with_diffusers import assert_same, common_arguments
from tests.support.model_check import refuse_unusable
from tests.support.model_folders import error_message
from tests.support.original_layout import original_tensors
from tests.support.random_models import SMALL_VAE
from tests.support.small_models import save_flux, save_sd, save_sdxl
from tests.support.sync_engine import generate_alone, make_request, make_settings

_REQUEST = make_request(num_inference_steps=3, guidance_scale=4.0, negative_prompt="a blurred dog")
_SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "small-sdxl")


def _load(folder: Path, **options: Any) -> Any:
    return loading.load_any(folder, make_settings(), None, ModelOptions.model_validate(options))


def _stock(folder: Path, request: GenerationRequest, changes: Any = None, **arguments: Any) -> np.ndarray:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if changes is not None:
        changes(pipeline)
    return np.asarray(pipeline(**arguments, **common_arguments(request)).images[0])


def test_the_scheduler_is_that_of_requests_without_a_sampler(sd_folder: Path) -> None:
    family, other = _load(sd_folder, scheduler="heun_karras"), _load(sd_folder)
    named = make_request(num_inference_steps=3, sampler="heun_karras")
    unnamed = make_request(num_inference_steps=3)
    assert (generate_alone(family, unnamed) == generate_alone(other, named)).all()
    assert (generate_alone(other, unnamed) != generate_alone(other, named)).any()
    message = error_message(_load, sd_folder, scheduler="eular")
    assert "not 'eular'" in message
    assert "euler" in message


def test_the_spacing_of_timesteps_equals_a_folder_with_it(sdxl: Path, tmp_path: Path) -> None:
    folder = with_fields(save_sdxl, _SCHEDULER, timestep_spacing="trailing")(tmp_path / "trailing")
    arguments = {"prompt": _REQUEST.prompt, "negative_prompt": _REQUEST.negative_prompt}
    image = generate_alone(_load(sdxl, timestep_spacing="trailing"), _REQUEST)
    assert_same(image, _stock(folder, _REQUEST, **arguments))
    assert (image != _stock(sdxl, _REQUEST, **arguments)).any()


@pytest.mark.parametrize("form", ["folder", "file of diffusers", "file of the original code"])
def test_another_vae_decodes(form: str, sdxl: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    vae: Any = AutoencoderKL(**SMALL_VAE, scaling_factor=0.13025).eval()
    vae.save_pretrained(tmp_path / "vae")
    source = tmp_path / "vae"
    if form == "file of diffusers":
        source = next(source.glob("*.safetensors"))
    elif form == "file of the original code":
        pipeline: Any = DiffusionPipeline.from_pretrained(sdxl, vae=vae)
        start = "first_stage_model."
        tensors = {
            name.removeprefix(start): tensor
            for name, tensor in original_tensors(pipeline).items()
            if name.startswith(start)
        }
        source = tmp_path / "vae.safetensors"
        save_file(tensors, source)
    arguments = {"prompt": _REQUEST.prompt, "negative_prompt": _REQUEST.negative_prompt}
    stock = _stock(sdxl, _REQUEST, lambda pipeline: pipeline.register_modules(vae=vae), **arguments)
    assert_same(generate_alone(_load(sdxl, vae=find_vae(str(source))), _REQUEST), stock)


def test_a_vae_with_other_tensors_is_refused(sdxl: Path, tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, file)
    assert "is not a VAE for this model: The tensor '" in error_message(_load, sdxl, vae=str(file))
    assert "no such folder or .safetensors file" in error_message(find_vae, "nowhere at all")


def test_a_vae_with_other_latents_is_refused(sdxl: Path, tmp_path: Path) -> None:
    config = {**cast(Any, AutoencoderKL).load_config(sdxl / "vae"), "latent_channels": 16}
    cast(Any, AutoencoderKL.from_config(config)).save_pretrained(tmp_path / "vae")
    message = error_message(_load, sdxl, vae=str(tmp_path / "vae"))
    assert message == "The VAE is for another model: its latents have 16 channels instead of 4."


def test_served_model_files_have_the_options(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("source: a/b\nprediction_type: v_prediction\nclip_skip: 2\nvae: ./vae.safetensors\n")
    entry = ModelEntry.model_validate(read_entries([str(file)])[0])
    assert entry.options == ModelOptions(
        prediction_type="v_prediction", clip_skip=2, vae=str(tmp_path / "vae.safetensors")
    )


def test_options_that_a_scheduler_cannot_have_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    assert "needs prediction_type v_prediction" in error_message(_load, sd_folder, zero_terminal_snr=True)
    assert "does not apply to flow matching models" in error_message(
        _load, save_flux(tmp_path / "flux"), prediction_type="v_prediction"
    )


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        (
            _SCHEDULER,
            {
                "_class_name": "PNDMScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
            "scheduler_config.json has rescale_betas_zero_snr, which PNDMScheduler does not have",
        ),
        (
            _SCHEDULER,
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "cannot use the scheduler FlowMatch",
        ),
        ("vae/config.json", {"latents_whitening": [1.0]}, "vae/config.json has latents_whitening"),
    ],
)
def test_fields_that_would_be_ignored_are_refused(
    file: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save = with_fields(save_sd, file, **fields)
    if "FlowMatch" in reason or "PNDM" in reason:
        save = with_fields(save, PIPELINE_FILE, scheduler=["diffusers", fields["_class_name"]])
    assert reason in error_message(loading.load, save(tmp_path / "model"), make_settings())


def test_an_old_name_of_the_feature_extractor_is_ignored(sd_folder: Path, tmp_path: Path) -> None:
    """Only the safety checker, which is not loaded, needs it; a class that is needed is named."""
    entry = ["transformers", "CLIPFeatureExtractor"]
    folder = with_fields(save_sd, PIPELINE_FILE, feature_extractor=entry)(tmp_path / "old")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor/preprocessor_config.json").write_text("{}")
    refuse_unusable(folder)
    assert (generate_alone(_load(folder), _REQUEST) == generate_alone(_load(sd_folder), _REQUEST)).all()
    folder = with_fields(save_sd, PIPELINE_FILE, text_encoder=["transformers", "NoModel"])(tmp_path / "new")
    for refuse in (refuse_unusable, _load):
        assert "has a NoModel as text_encoder, which the installed transformers" in error_message(
            refuse, folder
        )


def test_zero_terminal_snr_replaces_a_scheduler_that_lacks_it(tmp_path: Path) -> None:
    save = with_fields(save_sd, PIPELINE_FILE, scheduler=["diffusers", "PNDMScheduler"])
    folder = save(tmp_path / "model")
    PNDMScheduler(steps_offset=1).save_pretrained(folder / "scheduler")
    family = _load(folder, prediction_type="v_prediction", zero_terminal_snr=True)
    assert family.schedulers.published.config.rescale_betas_zero_snr
    assert generate_alone(family, _REQUEST).std() > 0


@pytest.mark.parametrize("name", ["FluxControlImg2ImgPipeline", "StableDiffusionInstructPix2PixPipeline"])
def test_pipelines_that_need_an_image_are_refused_by_their_index(name: str, tmp_path: Path) -> None:
    file = tmp_path / PIPELINE_FILE
    file.write_text(f'{{"_class_name": "{name}"}}')
    assert "needs 'image'" in error_message(require_pipeline, "a/b", servable(), file)
    file.write_text('{"_class_name": "FluxKontextPipeline"}')
    require_pipeline("a/b", servable(), file)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "v_prediction", "zero_terminal_snr": True},
        {"timestep_spacing": "trailing"},
        {"scheduler": "dpmpp_sde_karras"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "published", [DDIMScheduler, DPMSolverSinglestepScheduler, EulerDiscreteScheduler, PNDMScheduler]
)
def test_samplers_found_without_torch_are_those_of_the_model(
    published: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", published.__name__]}
    (tmp_path / PIPELINE_FILE).write_text(json.dumps(index))
    published().save_pretrained(tmp_path / "scheduler")
    given = ModelOptions.model_validate(options)
    factory = SchedulerFactory(with_options(published(), given, is_edm_model=False))
    factory.set_default(given.scheduler)
    found = samplers_of(tmp_path, given)
    assert found.samplers.keys() == factory.samplers.keys()
    assert found.min_steps == factory.min_steps
