"""Settings: sources, precedence, and errors at startup."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypergen.config import Settings
from hypergen.engine_client.environment import engine_environment
from hypergen.errors import ConfigurationError
from hypergen.load_settings import environment_of, load_settings
from hypergen.model_store.components import find_controlnets
from hypergen.model_store.entries import state_folder
from hypergen.model_store.hub import HUB_ID
from hypergen.setting_names import fields, option_name

CONFIGS = Path(__file__).parents[1] / "configs"


def test_defaults_are_those_of_the_documents() -> None:
    settings = load_settings()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)
    assert settings.queue.max_queue_size == 100
    assert settings.queue.queue_timeout_s == 600
    assert settings.engine.determinism == "strict"
    assert settings.models == ()


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("queue: {max_queue_size: 1, queue_timeout_s: 1}\nserver: {port: 1001}\n")
    environment = {"HYPERGEN_CONFIG": str(file), "HYPERGEN_QUEUE_TIMEOUT": "2", "HYPERGEN_PORT": "1002"}
    settings = load_settings(environment=environment, flags={"port": 1003, "host": None})
    assert settings.queue.max_queue_size == 1
    assert settings.queue.queue_timeout_s == 2
    assert settings.server.port == 1003


def test_the_file_and_the_environment_override_arguments_of_a_bento(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {dtype: float16}\nqueue: {max_queue_size: 5}\n", encoding="utf-8")
    arguments = {"models": "a,b", "dtype": "float32", "max_batch_size": "2", "queue_timeout": "7"}
    settings = load_settings(file, {"HYPERGEN_MAX_BATCH_SIZE": "3"}, arguments=arguments)
    assert [entry.source for entry in settings.models] == ["a", "b"]
    assert (settings.engine.dtype, settings.engine.max_batch_size) == ("float16", 3)
    assert (settings.queue.max_queue_size, settings.queue.queue_timeout_s) == (5, 7)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"modles": "a"}, "Unknown argument 'modles'; did you mean models?"),
        ({"dtype": "half"}, "Argument 'dtype': Input should be .*given: 'half'"),
        ({"api_key": "sk-1"}, "Argument 'api_key' would be readable in the Bento; set HYPERGEN_API_KEY"),
    ],
)
def test_a_wrong_argument_is_named(argument: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_settings(arguments=argument)


# The model ids of both Hyperbolic documents, and the LoRAs that they name.
DOCUMENTED = {
    "SDXL1.0-base": "sdxl.yaml",
    "SDXL-turbo": "sdxl-turbo.yaml",
    "SD1.5": "sd15.yaml",
    "SD2": "sd2.yaml",
    "SSD": "ssd-1b.yaml",
    "SD3.5": "sd3.5.yaml",
    "FLUX.1-dev": "flux-dev.yaml",
    "FLUX.1-schnell": "flux-schnell.yaml",
    "ControlNet-SDXL": "controlnet-sdxl.yaml",
}
LORAS = {
    "sdxl.yaml": "Add_Detail More_Art Pixel_Art Logo Sci-fi Crayons Paint_Splash Outdoor_Product_Photography",
    "sd15.yaml": "Add_Detail Superhero Lineart Anime_Lineart Cartoon_Background Pencil_Sketch",
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_served_model_file_loads(file: Path) -> None:
    (entry,) = load_settings(flags={"models": (str(file),)}).models
    assert entry.source == "hypergen-tiny" or HUB_ID.fullmatch(entry.source or "")
    assert entry.source == "hypergen-tiny" or entry.revision
    assert None not in entry.defaults.model_dump().values()
    assert list(entry.loras) == LORAS.get(file.name, "").split()
    assert not any(entry.loras.values())  # for the operator to fill in
    assert find_controlnets(entry.controlnet) == entry.controlnet


def test_every_documented_model_has_a_file() -> None:
    files = {file.name: str(file) for file in CONFIGS.glob("*.yaml")}
    entries = dict(zip(files, load_settings(flags={"models": tuple(files.values())}).models, strict=True))
    for name, file in DOCUMENTED.items():
        found = [path for path, entry in entries.items() if name in (entry.name, *entry.aliases)]
        assert found == [file]


def test_a_slash_at_the_end_of_a_prefix_is_dropped() -> None:
    environment = {"HYPERGEN_STORAGE": "s3://images/results/"}
    assert load_settings(environment=environment).server.storage == "s3://images/results"


@pytest.mark.parametrize("name", sorted(name for _, name, _ in fields()))
def test_every_setting_has_a_description_and_round_trips_through_the_environment(name: str) -> None:
    section, _, field = next(entry for entry in fields() if entry[1] == name)
    assert field.description
    defaults = Settings.model_validate({}).model_dump()
    value = (defaults[section] if section else defaults)[name]
    read = load_settings(environment=environment_of({name: value})).model_dump()
    assert (read[section] if section else read)[name] == value
    assert not option_name(name).endswith("_s")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 80", "settings.yaml, line 1: Unknown setting 'port'; did you mean server.port?"),
        ("model: hypergen-tiny", "Unknown setting 'model'; did you mean models"),
        (
            "\nqueue:\n  max_que_size: 1",
            "line 3: Unknown setting 'queue.max_que_size'; did you mean queue.max_queue_size",
        ),
        ("nonsense_of_a_kind: 1", "Unknown setting 'nonsense_of_a_kind'."),
        ("server:\n  api_key: [sk-1]", "line 2: Setting 'server.api_key': "),
        ("queue: {max_queue_size: 0}", "queue.max_queue_size"),
        ("queue: {queue_timeout_s: .nan}", "queue.queue_timeout_s"),
        ("server: {public_url: 'ftp://host'}", "server.public_url"),
        ("- a list", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_an_invalid_file_gets_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        load_settings(file)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_variable_is_an_error_but_those_of_kubernetes_are_ignored() -> None:
    with pytest.raises(ConfigurationError, match=r"HYPERGEN_MAX_QUEUE; did you mean HYPERGEN_MAX_QUEUE_SIZE"):
        load_settings(environment={"HYPERGEN_MAX_QUEUE": "1"})
    kubernetes: dict[str, str] = {}
    for service in ("HYPERGEN", "HYPERGEN_WEB", "HYPERGEN_API_KEY_STORE"):
        kubernetes |= {f"{service}_PORT": "tcp://10.0.0.1:80", f"{service}_SERVICE_HOST": "10.0.0.1"}
        kubernetes |= {f"{service}_SERVICE_PORT_HTTP": "80", f"{service}_PORT_80_TCP_ADDR": "10.0.0.1"}
        kubernetes |= {f"{service}_SERVICE_PORT": "80", f"{service}_PORT_80_TCP": "tcp://10.0.0.1:80"}
    assert load_settings(environment=kubernetes).server.port == 8000


def test_an_error_names_what_the_user_wrote(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("server: {port: 8001}\n")
    for environment, flags, start in (
        ({}, {"max_steps": 0}, "--max-steps: "),
        ({"HYPERGEN_MAX_STEPS": "0"}, {}, "HYPERGEN_MAX_STEPS: "),
        ({"HYPERGEN_REQUEST_TIMEOUT": "soon"}, {}, "HYPERGEN_REQUEST_TIMEOUT: "),
    ):
        with pytest.raises(ConfigurationError) as raised:
            load_settings(file, environment, flags)
        assert str(raised.value).startswith(start)


def test_an_invalid_key_is_not_in_the_error_message() -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_settings(flags={"api_key": ["sk-secret"]})
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_key_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="HYPERGEN_API_KEY is empty"):
        load_settings(environment={"HYPERGEN_API_KEY": value})


def test_named_sources_come_from_flags_the_environment_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {controlnet: {edges: owner/edges, depth: /models/depth}}\n")
    expected = {"edges": "owner/edges", "depth": "/models/depth"}
    assert load_settings(file).engine.controlnet == expected
    flags = {"controlnet": ("edges=owner/edges", "depth=/models/depth")}
    assert load_settings(flags=flags).engine.controlnet == expected
    environment = environment_of({"controlnet": expected})
    assert environment == {"HYPERGEN_CONTROLNET": "edges=owner/edges,depth=/models/depth"}
    assert load_settings(environment=environment).engine.controlnet == expected


@pytest.mark.parametrize("value", ["edges", "=owner/edges", "edges=", "edges=a/b,edges=c/d"])
def test_a_named_source_is_a_name_and_a_source(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^HYPERGEN_CONTROLNET: .*(NAME=SOURCE|twice)"):
        load_settings(environment={"HYPERGEN_CONTROLNET": value})


def test_a_named_source_with_a_comma_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {controlnet: {edges: '/models/a,b'}}\n")
    with pytest.raises(ConfigurationError, match="without commas"):
        load_settings(file)


@pytest.mark.parametrize(
    "host", ["http://gpu.example", "gpu.example:8000", "gpu.example/x", "é.example", "*"]
)
def test_an_allowed_host_is_a_plain_name(host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^HYPERGEN_ALLOWED_HOST: "):
        load_settings(environment={"HYPERGEN_ALLOWED_HOST": f"ok.example, {host}"})


def test_allowed_hosts_given_as_flags_reach_the_service() -> None:
    environment = environment_of({"allowed_host": ("a.example", "b.example")})
    assert load_settings(environment=environment).server.allowed_host == ("a.example", "b.example")


def test_allowed_hosts_are_separated_by_commas() -> None:
    settings = load_settings(environment={"HYPERGEN_ALLOWED_HOST": "a.example, B.example."})
    assert settings.server.allowed_host == ("a.example", "b.example")


def test_compile_sizes_are_separated_by_commas_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {compile: on, compile_sizes: [1024x1024, 768x1344]}\n")
    environment = environment_of({"compile": "on", "compile_sizes": ("1024x1024, 768x1344", "1024x1024")})
    for settings in (load_settings(file), load_settings(environment=environment)):
        assert settings.engine.compile_sizes == ((1024, 1024), (768, 1344))


@pytest.mark.parametrize("value", ["1024", "1024x", "1020x1024", "32x64", "16384x64", "1024x1024,"])
def test_an_invalid_compile_size_is_named(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^HYPERGEN_COMPILE_SIZES: must be sizes such as"):
        load_settings(environment={"HYPERGEN_COMPILE": "on", "HYPERGEN_COMPILE_SIZES": value})


def test_compile_sizes_without_compile_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"^--compile-sizes: needs --compile on"):
        load_settings(flags={"compile_sizes": ("1024x1024",)})


def test_engines_keep_compiled_code_beside_the_model_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert engine_environment()["TORCHINDUCTOR_CACHE_DIR"] == str(state_folder() / "torchinductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert engine_environment()["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_on_and_off_need_no_quotes_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {compile: on, vae_tiling: on, offload: off, quantization: off}\n")
    engine = load_settings(file).engine
    assert (engine.compile, engine.vae_tiling, engine.offload, engine.quantization) == (
        "on",
        "on",
        "off",
        "off",
    )


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://App.example", "null"])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^HYPERGEN_CORS_ORIGIN: "):
        load_settings(environment={"HYPERGEN_CORS_ORIGIN": f"https://ok.example:8443,{origin}"})


def test_origins_given_as_flags_reach_the_service() -> None:
    environment = environment_of({"cors_origin": ("https://a.example", "http://b.example:3000")})
    expected = ("https://a.example", "http://b.example:3000")
    assert load_settings(environment=environment).server.cors_origin == expected


@pytest.mark.parametrize("proxy", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "http://10.0.0.1", "**"])
def test_a_trusted_proxy_is_an_address_or_a_network(proxy: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^HYPERGEN_TRUSTED_PROXY: .*an IP address or network"):
        load_settings(environment={"HYPERGEN_TRUSTED_PROXY": f"127.0.0.1, {proxy}"})
    trusted = load_settings(environment={"HYPERGEN_TRUSTED_PROXY": "::1, 10.0.0.0/8"}).server.trusted_proxy
    assert trusted == ("::1", "10.0.0.0/8")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("./nosuch", "{folder}/nosuch"),
        ("model", "{folder}/model"),
        ("parts/model", "{folder}/parts/model"),
        ("checkpoint.safetensors", "{folder}/checkpoint.safetensors"),
        ("owner/name", "owner/name"),
        ("~/model.safetensors", "~/model.safetensors"),
        ("/models/model.safetensors", "/models/model.safetensors"),
    ],
)
def test_a_relative_source_is_from_the_folder_of_its_file(tmp_path: Path, source: str, expected: str) -> None:
    for folder in ("model", "parts/model"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "model.yaml"
    file.write_text(f"source: {source}\n")
    (entry,) = load_settings(flags={"models": (str(file),)}).models
    assert str(Path(str(entry.source))) == expected.format(folder=tmp_path)


def test_the_password_of_the_jobs_url_is_in_no_message_and_in_no_bento() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(flags={"jobs": "redis://:secret@host:6379/first"})
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="HYPERGEN_JOBS"):
        load_settings(arguments={"jobs": "redis://:secret@host:6379/0"})
    settings = load_settings(environment={"HYPERGEN_JOBS": "rediss://:secret@host:6379/0"})
    assert settings.server.jobs == "rediss://:secret@host:6379/0"
    assert "secret" not in repr(settings)
