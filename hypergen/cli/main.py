"""The command line: `hypergen serve` and the other commands."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

# Disable telemetry before bentoml or a hub client is imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import click

from hypergen import __version__, log_setup, optional_packages
from hypergen.api.api_keys import ApiKeys
from hypergen.cli.grouped_help import ServeCommand
from hypergen.cli.image_commands import generate, show_file
from hypergen.cli.model_commands import (
    check_config,
    import_model,
    inspect_file,
    list_models,
    print_table,
    remove_models,
)
from hypergen.cli.setting_options import CONFIG, setting_options
from hypergen.errors import ConfigurationError, HyperGenError, ModelError, SettingError, of_model
from hypergen.load_settings import environment_of, load_named_settings, load_settings
from hypergen.setting_names import flag_of

logger = logging.getLogger("hypergen.cli")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Serve open diffusion models with OpenAI's and Hyperbolic's image APIs."""


for command in (generate, show_file, list_models, import_model, inspect_file, check_config, remove_models):
    main.add_command(command)


@main.command(cls=ServeCommand)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@CONFIG
@click.option("--reload", is_flag=True, help="restart when the source changes")
@setting_options()
def serve(models: tuple[str, ...], config: Path | None, reload: bool, **flags: Any) -> None:
    """Serve one or several MODELs over HTTP.

    MODEL is a hub id (owner/name), a folder in diffusers' layout, a checkpoint in one .safetensors file, a
    tag of the model store, or a served-model file such as those in configs/; by default it is the model that
    comes with HyperGen. Requests choose among several by name; the default is the first.
    """
    from hypergen.app import check_shared_store
    from hypergen.bentoml_integration.listen_check import check_port
    from hypergen.cli.serve import run_service
    from hypergen.cli.start_checks import check_certificate, check_models, check_storage
    from hypergen.engine_client.accelerators import find_accelerators
    from hypergen.resolve_models import find_models, resolved_entries, resolved_flags
    from hypergen.served_model_config import as_json

    settings, names = load_named_settings(config, os.environ, {**flags, "models": models})
    with names.in_messages(settings):
        keys = ApiKeys(settings.server)
        check_certificate(settings.server)
        check_shared_store(settings.server)
        check_storage(settings.server)
        find_accelerators(settings.engine)  # reports missing devices
        check_models(settings)
        port = check_port(settings.server.host, settings.server.port)
        log_setup.export(settings.server.log_format, settings.server.log_level)
        log_setup.configure("serve")
        if port != settings.server.port:
            flags["port"] = port
            settings = load_settings(config, os.environ, {**flags, "models": models})
        found = find_models(settings, logger.info, check_stored=True)
        host = settings.server.host
        if not keys and host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("No API key is set and %s can be reached from outside this machine.", host)
        flags |= resolved_flags(settings.engine)
        flags["models"] = as_json(resolved_entries(settings, found))
    # The service loads the settings from its environment, so that no secret is on its command line. It runs
    # in its own folder, so models and paths are resolved here.
    for name in ("api_key_file", "ssl_certfile", "ssl_keyfile"):
        if file := getattr(settings.server, name):
            flags[name] = file.resolve()
    environment = environment_of(flags)
    file = config or os.environ.get("HYPERGEN_CONFIG")
    if file:
        environment["HYPERGEN_CONFIG"] = str(Path(file).resolve())
    sys.exit(run_service(settings, environment, found[0].path, reload))


@main.command()
@click.argument("model", required=False)
@CONFIG
@setting_options("lora", "lora_dir")
def loras(model: str | None, config: Path | None, **flags: Any) -> None:
    """List the LoRAs that a server with these settings offers for MODEL, by default the embedded model.

    The LoRAs of a hub model are listed if it is in the store; nothing is downloaded.
    """
    from hypergen.lora.summary import summarise
    from hypergen.model_store import store
    from hypergen.model_store.lora_files import open_registry
    from hypergen.resolve_models import entries_of, settings_of

    settings, names = load_named_settings(config, os.environ, {**flags, "models": (model,) if model else ()})
    with names.in_messages(settings):
        entries = entries_of(settings)
        for index, entry in enumerate(entries):
            if len(entries) > 1:
                click.echo(f"{entry.name or entry.source or store.EMBEDDED_NAME}:")
            with of_model(index):
                registry = open_registry(
                    settings_of(entry, settings.engine), store.local_folder(entry.source)
                )
            rows = [("NAME", "MODEL", "LAYOUT", "RANK", "SIZE")]
            for name, path in sorted(registry.files.items()):
                shown = f"{name} (default)" if name == registry.default else name
                try:
                    lora = summarise(path)
                except ModelError as error:
                    rows.append((shown, "-", str(error), "-", "-"))
                    continue
                ranks = ",".join(map(str, lora.ranks))
                rows.append((shown, lora.model, lora.layout, ranks, f"{lora.size_bytes / 1e6:.1f} MB"))
            unfilled = (name for name, file in sorted(entry.loras.items()) if not file)
            rows += [(name, "-", "no file yet, not offered", "-", "-") for name in unfilled]
            print_table(rows)


def _comma_separated(item: click.ParamType) -> Callable[..., tuple[Any, ...]]:
    return lambda context, parameter, value: tuple(
        item.convert(part.strip(), parameter, context) for part in (value.split(",") if value else ())
    )


@main.command()
@click.argument("url")
@click.option(
    "--rate",
    type=float,
    default=2.0,
    help="mean requests per second; inf sends all at once",
    show_default=True,
)
@click.option(
    "--requests", type=click.IntRange(1), default=100, help="requests of the run", show_default=True
)
@click.option(
    "--sizes",
    callback=_comma_separated(click.STRING),
    help="sizes of the mix, such as 512x512,1024x1024  [default: the server's]",
)
@click.option(
    "--steps",
    callback=_comma_separated(click.IntRange(1)),
    help="denoising steps of the mix, such as 20,30  [default: the server's]",
)
@click.option("--prompt", help="prompt of every request  [default: a red circle on a blue background]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="file with a prompt per line",
)
@click.option("--model", help="the field `model`  [default: not sent]")
@click.option("--seed", type=int, default=0, help="of the arrivals and the mix", show_default=True)
@click.option("--seed-requests", is_flag=True, help="send a seed with each request")
@click.option(
    "--api-key",
    envvar=["HYPERGEN_API_KEY", "OPENAI_API_KEY"],
    help="bearer key  [default: HYPERGEN_API_KEY or OPENAI_API_KEY]",
)
@click.option("--timeout", type=float, default=600.0, help="seconds per request", show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="file for every request's result",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="PNG file; needs matplotlib")
def bench(
    url: str,
    api_key: str | None,
    timeout: float,
    prompt: str | None,
    prompts: Path | None,
    json_file: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure latency and throughput of the server at URL, ours or another with OpenAI's images API.

    URL is an address such as http://127.0.0.1:8000, or a client's base URL such as https://api.example.com/v1.
    Requests arrive at random (Poisson), independent of unfinished ones. Only fields given as options are
    sent, because not every server supports `num_inference_steps` and `seed`.
    """
    from rich.console import Console

    from hypergen.cli import bench

    for name, value in (("rate", options["rate"]), ("timeout", timeout)):
        if not value > 0:
            raise ConfigurationError(f"--{name} must be above 0, not {value}.")
    if prompt and prompts:
        raise ConfigurationError("--prompt and --prompts cannot be combined.")
    if plot:
        optional_packages.require("matplotlib", "plot")
    texts = [prompt or "a red circle on a blue background"]
    if prompts:
        texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise ConfigurationError(f"{prompts} holds no prompt.")
    for file in filter(None, (json_file, plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    planned = bench.plan_requests(prompts=texts, **options)
    results, interrupted = bench.run_bench(bench.endpoint_of(url), api_key, planned, timeout)
    bench.print_results(results, Console(markup=False, highlight=False))
    if interrupted:
        _print(f"Interrupted: {len(results)} of {len(planned)} requests finished.")
    if json_file:
        # JSON has no infinity.
        options["rate"] = options["rate"] if isfinite(options["rate"]) else "inf"
        report = {"url": url, **options, "timeout_s": timeout, "summary": bench.summarize(results)}
        report["results"] = [asdict(result) for result in results]
        json_file.write_text(json.dumps(report, indent=2), encoding="utf-8")
    if plot:
        bench.plot_results(results, plot)
    if interrupted or all(result.error for result in results):
        sys.exit(130 if interrupted else 1)


def _print(message: str) -> None:
    click.echo(message, err=True)


def run() -> None:
    """The entry point; a HyperGenError becomes one line and exit code 1."""
    try:
        main()
    except HyperGenError as error:
        is_setting = isinstance(error, SettingError)  # without a file of settings, it was a flag
        _print(f"Error: {error.named(flag_of(error.setting)) if is_setting else error}")
        sys.exit(1)


if __name__ == "__main__":
    run()
