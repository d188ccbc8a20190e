"""The options of a long `--help` in named groups, the usual ones first."""

from __future__ import annotations

import click

USUAL, OTHER = "Usual options", "Other options"
# Title -> parameters of `hypergen serve`, in the order of the help.
SERVE_GROUPS = {
    USUAL: (
        "config",
        "host",
        "port",
        "api_key",
        "api_key_file",
        "device",
        "dtype",
        "lora_dir",
        "max_batch_size",
        "max_queue_size",
    ),
    "Models": (
        "served_model_name",
        "revision",
        "single_file_config",
        "refiner",
        "unknown_model",
        "prompt_weighting",
        "max_prompt_chunks",
    ),
    "LoRAs, ControlNets and textual inversions": (
        "lora",
        "max_loras",
        "max_lora_rank",
        "max_lora_mb",
        "lora_cache_mb",
        "controlnet",
        "embedding",
    ),
    "Speed": ("devices", "determinism", "aging", "compile", "compile_sizes", "cuda_graphs", "attention"),
    "Memory": (
        "vae_dtype",
        "vae_tiling",
        "offload",
        "quantization",
        "model_memory_gb",
        "host_memory_gb",
        "idle_unload_s",
        "prompt_cache_mb",
    ),
    "Limits of requests": (
        "max_side",
        "max_steps",
        "max_megapixel_steps",
        "max_body_mb",
        "max_text_body_mb",
        "max_input_image_mb",
        "queue_timeout_s",
        "request_timeout_s",
        "strict",
    ),
    "Results": (
        "image_metadata",
        "safety_checker",
        "c2pa_certificate",
        "c2pa_key",
        "price_rate",
        "max_jobs",
        "jobs",
        "public_url",
        "idempotency_mb",
        "storage",
        "storage_public_url",
        "url_lifetime_s",
        "url_storage_mb",
    ),
    "Network": (
        "playground",
        "ssl_certfile",
        "ssl_keyfile",
        "allowed_host",
        "cors_origin",
        "trusted_proxy",
        "root_path",
        "keep_alive_s",
        "backlog",
    ),
    "Operation": ("log_format", "log_level", "drain_timeout_s", "engine_stall_timeout_s", "reload"),
}
GENERATE_GROUPS = {
    USUAL: (
        "output",
        "model",
        "size",
        "num_inference_steps",
        "guidance_scale",
        "seed",
        "negative_prompt",
        "n",
        "loras",
        "source",
    ),
    "Image": ("sampler", "prompt_weighting", "image_metadata"),
    "Model": ("device", "dtype", "lora_dir", "embedding", "single_file_config", "config"),
}


class GroupedCommand(click.Command):
    """A command whose help has its options in `groups`: title -> names of parameters."""

    groups: dict[str, tuple[str, ...]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = (parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option))
        parameters = {str(option.name): option for option in options}
        grouped = {name for names in self.groups.values() for name in names}
        rest = tuple(name for name in parameters if name not in grouped)
        for title, names in {**self.groups, OTHER: rest}.items():
            with formatter.section(title):
                records = (parameters[name].get_help_record(ctx) for name in names)
                formatter.write_dl([record for record in records if record])


class ServeCommand(GroupedCommand):
    groups = SERVE_GROUPS


class GenerateCommand(GroupedCommand):
    groups = GENERATE_GROUPS
