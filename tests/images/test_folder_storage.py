"""Storage of `url` results in a folder."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

from hypergen.errors import StorageFullError
from hypergen.images.folder_storage import FolderStorage


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, in which a storage creates its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def storage() -> FolderStorage:
    return FolderStorage(lifetime_s=60, max_bytes=1000)


async def put(storage: FolderStorage, data: bytes = b"data") -> str:
    return await storage.put(data, "png", "image/png")


def folder_in(temporary: Path) -> Path:
    (folder,) = temporary.iterdir()
    return folder


async def test_an_image_is_stored_with_its_media_type(storage: FolderStorage) -> None:
    stored = storage.get(await storage.put(b"data", "jpg", "image/jpeg"))
    assert stored
    assert (stored.path.read_bytes(), stored.media_type, stored.size) == (b"data", "image/jpeg", 4)


def test_no_folder_is_created_before_the_first_image(storage: FolderStorage, temporary: Path) -> None:
    storage.close()
    assert storage.get("x.png") is None
    assert not list(temporary.iterdir())


async def test_only_the_owner_can_access_the_folder(storage: FolderStorage, temporary: Path) -> None:
    await put(storage)
    assert folder_in(temporary).stat().st_mode & 0o777 == 0o700


async def test_names_have_192_random_bits(storage: FolderStorage) -> None:
    names = {await put(storage, b"") for _ in range(1000)}
    assert len(names) == 1000
    assert all(len(name.removesuffix(".png")) == 32 for name in names)  # 192 bits in base64


@pytest.mark.parametrize("name", ["", ".", "..", "../{}", "./{}", "/etc/passwd", "a\0b", "{}/", "{}\0"])
async def test_a_name_is_never_used_as_a_path(storage: FolderStorage, name: str) -> None:
    assert storage.get(name.format(await put(storage))) is None


async def test_an_image_expires(temporary: Path) -> None:
    storage = FolderStorage(lifetime_s=0.05, max_bytes=1000)
    name = await put(storage)
    await asyncio.sleep(0.06)
    assert storage.get(name) is None
    assert not list(folder_in(temporary).iterdir())


async def test_the_oldest_images_are_removed_when_the_storage_is_full(
    storage: FolderStorage, temporary: Path
) -> None:
    names = [await put(storage, b"a" * 400) for _ in range(4)]
    assert [storage.get(name) is not None for name in names] == [False, False, True, True]
    assert len(list(folder_in(temporary).iterdir())) == 2


async def test_an_image_larger_than_the_storage_is_kept_until_the_next_one(storage: FolderStorage) -> None:
    small, large = await put(storage), await put(storage, b"a" * 2000)
    assert storage.get(small) is None
    assert storage.get(large)
    next_one = await put(storage)
    assert storage.get(large) is None
    assert storage.get(next_one)


async def test_close_removes_the_folder(storage: FolderStorage, temporary: Path) -> None:
    name = await put(storage)
    storage.close()
    assert storage.get(name) is None
    assert not os.listdir(temporary)


async def test_a_write_failure_is_reported_and_names_response_format(
    storage: FolderStorage, temporary: Path
) -> None:
    name = await put(storage)
    folder = folder_in(temporary)
    shutil.rmtree(folder)
    folder.write_bytes(b"not a folder")
    with pytest.raises(StorageFullError, match="b64_json") as raised:
        await put(storage)
    assert raised.value.param == "response_format"
    assert str(temporary) not in raised.value.message
    assert storage.get(name) is None


async def test_a_missing_temporary_folder_is_reported(
    storage: FolderStorage, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nothing"))
    with pytest.raises(StorageFullError):
        await put(storage)


async def test_a_partly_written_file_is_removed(storage: FolderStorage, temporary: Path) -> None:
    await put(storage)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(StorageFullError):
            await put(storage, b"a" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.stat().st_size for file in folder_in(temporary).iterdir()] == [4]


async def test_images_are_stored_again_after_the_folder_was_removed(
    storage: FolderStorage, temporary: Path
) -> None:
    lost = await put(storage)
    shutil.rmtree(folder_in(temporary))
    assert storage.get(lost) is None
    assert storage.get(await put(storage))
