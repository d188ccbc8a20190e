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

from hypergen.errors import ConfigurationError
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


COMPOSE_FOLDER = CONFIGS / "deploy"
COMPOSE = (COMPOSE_FOLDER / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_of_the_compose_file_is_hardened_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "caddy" else [])
    image = service["image"]
    assert image == "${HYPERGEN_IMAGE:?}" or re.fullmatch(r"[a-z/]+:v?\d+\.\d+[\w.-]*", image)


def test_no_value_of_the_compose_file_is_a_secret() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY|JOBS", name):
                assert re.search(r"\$\{\w+(:\?)?\}", str(value)), name


def test_the_settings_of_the_compose_file_exist() -> None:
    example = dict(re.findall(r"^#?(\w+)=(.*)$", (COMPOSE_FOLDER / ".env.example").read_text("utf-8"), re.M))
    environment = {
        name: re.sub(
            r"\$\{(\w+)(:\?|:\+[^}]*)?\}", lambda m: "" if (m[2] or "")[:2] == ":+" else example[m[1]], value
        )
        for name, value in SERVICES["replica-1"]["environment"].items()
    }
    server = load_settings(environment=environment).server
    assert (server.storage, server.log_format) == ("s3://images", "json")
    assert server.jobs is not None
    with pytest.raises(ConfigurationError, match="Unknown environment variable HYPERGEN_JOB;"):
        load_settings(environment={**environment, "HYPERGEN_JOB": "1"})


def test_the_variables_of_the_compose_file_are_those_of_the_example() -> None:
    example = (COMPOSE_FOLDER / ".env.example").read_text(encoding="utf-8")
    used = set(re.findall(r"(?<!\$)\$\{?([A-Z_0-9]+)", COMPOSE))
    assert used | {"COMPOSE_PROFILES"} == set(re.findall(r"^#?([A-Z_0-9]+)=", example, re.MULTILINE))


def test_the_files_that_the_compose_file_mounts_exist() -> None:
    volumes = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    mounted = [volume.partition(":")[0] for volume in volumes if volume.startswith(".")]
    assert len(mounted) == 6
    assert all((COMPOSE_FOLDER / path).is_file() for path in mounted)


def test_both_profiles_have_the_same_replicas() -> None:
    def replicas(profile: str) -> list[dict[str, Any]]:
        chosen = [service for service in SERVICES.values() if service.get("profiles") == [profile]]
        return [{k: v for k, v in service.items() if k not in ("profiles", "deploy")} for service in chosen]

    assert replicas("cpu") == replicas("gpu")
    names = {replica["networks"]["front"]["aliases"][0] for replica in replicas("cpu")}
    assert names == {"hypergen-1", "hypergen-2"}
    targets = {f"{name}:3000" for name in names}
    scraped = _read(COMPOSE_FOLDER / "compose" / "prometheus.yaml")["scrape_configs"][0]["static_configs"]
    assert set(scraped[0]["targets"]) == targets
    proxied = re.search(r"reverse_proxy (hypergen.*) \{", _lines("deploy/compose/Caddyfile"))
    assert proxied is not None
    assert set(proxied[1].split()) == targets


def _lines(path: str) -> str:
    text = (CONFIGS / path).read_text(encoding="utf-8")
    return "\n".join(line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] != "#")


def test_the_proxy_of_the_compose_file_has_the_directives_of_the_example_proxy() -> None:
    example = set(_lines("caddy/Caddyfile").splitlines())
    own = {"images.example.com {", "reverse_proxy 127.0.0.1:8000 {"}
    assert example - own < set(_lines("deploy/compose/Caddyfile").splitlines())
