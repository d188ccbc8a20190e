"""Inputs of the denoiser that only one family has: fields of a subclass of `ModelInputs`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergen.denoising.denoising_state import ModelInputs
from hypergen.models import loading
from hypergen.models.cfg import random_rows
from tests.support.sync_engine import make_request, make_settings, prepare_image


@dataclass(frozen=True, eq=False)
class _MaskedInputs(ModelInputs):
    attention_mask: Tensor | None = None


def test_a_batch_keeps_the_fields_of_the_subclass() -> None:
    rows = [_MaskedInputs(torch.ones(1, 3, 2), attention_mask=torch.full((1, 3), i)) for i in range(2)]
    batch = _MaskedInputs.stack(rows).map(lambda tensor: tensor * 2)
    assert isinstance(batch, _MaskedInputs)
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[0, 0, 0], [2, 2, 2]]
    assert batch.pooled_prompt_embeds is None


def test_the_probe_repeats_masks_and_varies_everything_else(sd_folder: Any) -> None:
    state = prepare_image(loading.load(sd_folder, make_settings()), make_request())
    mask = torch.tensor([[1, 1, 0]])
    embeds = state.positive.encoder_hidden_states
    state = replace(state, positive=_MaskedInputs(embeds, attention_mask=mask))
    _, _, inputs = random_rows(state, 4, torch.Generator().manual_seed(0))
    assert isinstance(inputs, _MaskedInputs)
    assert inputs.attention_mask is not None
    assert torch.equal(inputs.attention_mask, mask.expand(4, 3))
    assert len({tuple(row.flatten().tolist()) for row in inputs.encoder_hidden_states}) == 4
