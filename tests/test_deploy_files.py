"""The files in configs/deploy that other tools read, against those tools' own schemas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attr
import pytest
import yaml
from _bentoml_sdk.service.config import schema_type
from bentoml._internal.cloud.schemas.schemasv2 import CreateDeploymentSchema
from bentoml._internal.utils.cattr import bentoml_cattr
from cattrs.gen import make_dict_structure_fn

from hypergen.load_settings import load_settings

CONFIGS = Path(__file__).parents[1] / "configs"
BENTOCLOUD = {path.stem: path for path in (CONFIGS / "deploy" / "bentocloud").glob("*.yaml")}


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _deployment(config: dict[str, Any]) -> CreateDeploymentSchema:
    """Read as `bentoml deploy -f` does, but refuse keys that BentoML would ignore."""
    converter = bentoml_cattr.copy()
    converter.register_structure_hook_factory(
        attr.has, lambda cls: make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)
    )
    return converter.structure(config, CreateDeploymentSchema)


def test_each_served_model_file_of_a_model_has_a_bentocloud_deployment() -> None:
    served = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert set(BENTOCLOUD) == served - {"embedded", "controlnet-sdxl"}


@pytest.mark.parametrize("model", sorted(BENTOCLOUD))
def test_a_bentocloud_deployment_has_only_keys_and_settings_that_exist(model: str) -> None:
    deployment = _deployment(_read(BENTOCLOUD[model]))
    assert re.fullmatch(r"hypergen-[a-z0-9-]+", deployment.name or "")
    assert (deployment.bento, deployment.secrets) == (".", ["hypergen"])
    settings = load_settings(environment={env.name: env.value for env in deployment.envs or []})
    service = deployment.services["hypergen"]
    assert re.fullmatch(r"gpu\.[a-z0-9]+\.1", service.instance_type or "")
    assert service.scaling is not None
    assert (service.scaling.min_replicas, service.scaling.max_replicas) == (0, 4)
    overrides = service.config_overrides or {}
    schema_type.validate_python(overrides, extra="forbid")
    assert overrides["traffic"] == {"concurrency": settings.engine.max_batch_size, "external_queue": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": ["hypergen"]},
        {"services": {"hypergen": {"instance": "gpu.l4.1"}}},
        {"services": {"hypergen": {"scaling": {"min": 0}}}},
        {"envs": [{"key": "A", "value": "b"}]},
    ],
)
def test_an_unknown_key_of_a_bentocloud_deployment_is_found(changes: dict[str, Any]) -> None:
    config = _read(BENTOCLOUD["sdxl"])
    with pytest.raises(Exception, match="CreateDeploymentSchema"):
        _deployment({**config, **changes})
