"""Models of the Hugging Face hub: commits, files, downloads; failures become one-line ModelErrors."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hypergen.errors import ModelError
from hypergen.model_store.diffusers_layout import (
    PIPELINE_FILE,
    Selection,
    read_components,
    require_weights,
    select_files,
)

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
TIMEOUT_S = 10
_WEIGHTS, _FP16_WEIGHTS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
# Raises a ModelError if a folder, whose weights may be headers alone, cannot be used.
Check = Callable[[Path], None]


@dataclass(frozen=True)
class HubModel:
    """A model at one commit, and its selected files.

    Args:
        size_bytes: size of the selected files; 0 if the hub does not report it.
    """

    repo: str
    commit: str
    selection: Selection
    size_bytes: int


def split_revision(source: str) -> tuple[str, str | None]:
    """Hub id and revision of `owner/name@revision`; None without a revision."""
    repo, at, revision = source.partition("@")
    return repo, revision if at and revision else None


def resolve_hub_model(
    repo: str, *, revision: str | None, prefer_fp16: bool, check: Callable[[Path], None]
) -> HubModel:
    """Resolve the revision to a commit and select the files; downloads only `model_index.json`.

    Args:
        check: raises a ModelError if the model of this `model_index.json` cannot be served.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _one_line_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        commit = str(info.sha)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        if PIPELINE_FILE not in sizes:
            raise ModelError(
                f"{repo} on the hub has no {PIPELINE_FILE}; HyperGen serves models in diffusers layout."
            )
        pipeline_file = hf_hub_download(repo, PIPELINE_FILE, revision=commit, etag_timeout=TIMEOUT_S)
    check(Path(pipeline_file))
    components = read_components(Path(pipeline_file), repo)
    for component, class_name in components.items():
        names = [name for name in sizes if name.startswith(f"{component}/")]
        require_weights(repo, component, class_name, names)
    selection = select_files(sizes, components, prefer_fp16=prefer_fp16)
    size_bytes = sum(sizes[name] for name in selection.files.values())
    return HubModel(repo, commit, selection, size_bytes)


def download(model: HubModel) -> Path:
    """Download the selected files into the hub's cache; an interrupted download is resumed."""
    from huggingface_hub import snapshot_download

    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in model.selection.files.values()]
    with _one_line_errors(model.repo, model.commit):
        folder = snapshot_download(
            model.repo, revision=model.commit, allow_patterns=patterns, etag_timeout=TIMEOUT_S
        )
    return Path(folder)


@contextmanager
def linked(folder: Path, selection: Selection) -> Iterator[Path]:
    """A temporary folder of links, with the files of a selection as the store would have them."""
    with TemporaryDirectory(prefix="hypergen-") as name:
        for stored, source in selection.files.items():
            target = Path(name, stored)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to((folder / source).absolute())
        yield Path(name)


def write_headers(model: HubModel, selection: Selection, folder: Path) -> None:
    """Write the selected weights without their tensors: only headers are downloaded, into sparse files.

    Args:
        folder: its files are named as in the store.
    """
    from huggingface_hub import HfApi, errors

    for stored, name in selection.files.items():
        if not stored.endswith(".safetensors"):
            continue
        with _one_line_errors(model.repo, model.commit):
            try:
                found = HfApi().parse_safetensors_file_metadata(
                    model.repo, name, revision=model.commit, timeout=TIMEOUT_S
                )
            except errors.EntryNotFoundError:
                raise ModelError(f"{model.repo} on the hub has no {name}.") from None
            except (errors.SafetensorsParsingError, ValueError, TypeError, KeyError):
                raise ModelError(f"{model.repo}: {name} is damaged: its header cannot be read.") from None
        tensors = {
            key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
            for key, tensor in found.tensors.items()
        }
        header = json.dumps({"__metadata__": found.metadata, **tensors}).encode()
        size = max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
        target = folder / stored
        target.parent.mkdir(exist_ok=True)
        with target.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)


def cached_folders(repo: str) -> list[Path]:
    """Snapshots of a model in the hub's cache, without network access: first the last known commit of `main`,
    then the newest.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    main = try_to_load_from_cache(repo, PIPELINE_FILE)
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    found = sorted(snapshots.glob(f"*/{PIPELINE_FILE}"), key=lambda file: file.lstat().st_mtime, reverse=True)
    return [file.parent for file in sorted(found, key=lambda file: str(file) != main)]


def download_network(repo: str, revision: str | None, check: Check, *, prefer_fp16: bool = False) -> Path:
    """The folder of one network that is a hub model of its own, such as a VAE or a ControlNet; from the hub's
    cache if it is there.

    Args:
        check: called before the weights are downloaded.
        prefer_fp16: download the fp16 variant of the weights if there is one; see `variant_of`.
    """
    plain = Selection({"config.json": "config.json", _WEIGHTS: _WEIGHTS}, "none")
    fp16 = Selection({"config.json": "config.json", _WEIGHTS: _FP16_WEIGHTS}, "taken")
    return _download_files(repo, revision, [fp16, plain] if prefer_fp16 else [plain], check)


def download_safety_checker(repo: str, revision: str | None, check: Check) -> Path:
    """The same for a content filter, with its image processor."""
    files = ["config.json", "preprocessor_config.json", "model.safetensors"]
    return _download_files(repo, revision, [Selection({name: name for name in files}, "none")], check)


def _download_files(repo: str, revision: str | None, selections: list[Selection], check: Check) -> Path:
    """
    Args:
        selections: which differ in their weights, the preferred ones first; any in the cache is enough.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for selection in selections:
        files = list(selection.files.values())
        with suppress(LocalEntryNotFoundError):
            folder = Path(
                snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True)
            )
            if all((folder / name).is_file() for name in files):
                return folder
    configurations = selections[0].without_weights()
    with _one_line_errors(repo, revision):
        # By revision, so that the cache knows its commit.
        patterns = list(configurations.files)
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_S)
        )
        for name in configurations.files:
            if not (folder / name).is_file():
                raise ModelError(f"{repo} on the hub has no {name}.")
        *preferred, selection = selections
        for other in preferred:
            weights = [name for name in other.files.values() if name not in configurations.files]
            if all(HfApi().file_exists(repo, name, revision=folder.name) for name in weights):
                selection = other
                break
    model = HubModel(repo, commit=folder.name, selection=selection, size_bytes=0)
    with linked(folder, configurations) as headers:
        write_headers(model, selection, headers)
        check(headers)
    return download(model)


@contextmanager
def _one_line_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Raise every failure of the hub as a ModelError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{repo} is gated; accept its licence at https://huggingface.co/{repo} and set HF_TOKEN to a "
            "token of that account."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{repo} is not on the hub, or is private; check the name, or set HF_TOKEN to a token with "
            "access to it."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repo} has no revision '{revision}' on the hub.") from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(
            f"{repo} is not in the model store, and HF_HUB_OFFLINE forbids requests to the hub."
        ) from None
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]  hub's HTTP library's
        raise ModelError(f"{repo} cannot be downloaded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"the hub answered {status}" + (
            "; set HF_TOKEN to a token with access to it." if status in (401, 403) else "."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"{error.strerror} ({error.filename})"
    return (
        f"the hub is not reachable ({type(error).__name__}). "
        "Without a network, serve a folder or a model in the store."
    )
