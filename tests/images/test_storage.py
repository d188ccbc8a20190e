"""Storage of `url` results."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from hypergen.errors import StorageFullError
from hypergen.images.storage import ImageStorage


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, in which a storage creates its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def storage() -> ImageStorage:
    return ImageStorage(lifetime_s=60, max_bytes=1000)


def put(storage: ImageStorage, data: bytes = b"data") -> str:
    return storage.put(data, "png", "image/png")


def folder_in(temporary: Path) -> Path:
    (folder,) = temporary.iterdir()
    return folder


def test_an_image_is_stored_with_its_media_type(storage: ImageStorage) -> None:
    stored = storage.get(storage.put(b"data", "jpg", "image/jpeg"))
    assert stored
    assert (stored.path.read_bytes(), stored.media_type, stored.size) == (b"data", "image/jpeg", 4)


def test_no_folder_is_created_before_the_first_image(storage: ImageStorage, temporary: Path) -> None:
    storage.close()
    assert storage.get("x.png") is None
    assert not list(temporary.iterdir())


def test_only_the_owner_can_access_the_folder(storage: ImageStorage, temporary: Path) -> None:
    put(storage)
    assert folder_in(temporary).stat().st_mode & 0o777 == 0o700


def test_names_have_192_random_bits(storage: ImageStorage) -> None:
    names = {put(storage, b"") for _ in range(1000)}
    assert len(names) == 1000
    assert all(len(name.removesuffix(".png")) == 32 for name in names)  # 192 bits in base64


@pytest.mark.parametrize("name", ["", ".", "..", "../{}", "./{}", "/etc/passwd", "a\0b", "{}/", "{}\0"])
def test_a_name_is_never_used_as_a_path(storage: ImageStorage, name: str) -> None:
    assert storage.get(name.format(put(storage))) is None


def test_an_image_expires(temporary: Path) -> None:
    storage = ImageStorage(lifetime_s=0.05, max_bytes=1000)
    name = put(storage)
    assert storage.get(name)
    time.sleep(0.06)
    assert storage.get(name) is None
    assert not list(folder_in(temporary).iterdir())


def test_the_oldest_images_are_removed_when_the_storage_is_full(
    storage: ImageStorage, temporary: Path
) -> None:
    names = [put(storage, b"a" * 400) for _ in range(4)]
    assert [storage.get(name) is not None for name in names] == [False, False, True, True]
    assert len(list(folder_in(temporary).iterdir())) == 2


def test_an_image_larger_than_the_storage_is_kept_until_the_next_one(storage: ImageStorage) -> None:
    small, large = put(storage), put(storage, b"a" * 2000)
    assert storage.get(small) is None
    assert storage.get(large)
    next_one = put(storage)
    assert storage.get(large) is None
    assert storage.get(next_one)


def test_close_removes_the_folder(storage: ImageStorage, temporary: Path) -> None:
    name = put(storage)
    storage.close()
    assert storage.get(name) is None
    assert not list(temporary.iterdir())


def test_a_write_failure_is_reported_and_names_response_format(
    storage: ImageStorage, temporary: Path
) -> None:
    name = put(storage)
    folder = folder_in(temporary)
    shutil.rmtree(folder)
    folder.write_bytes(b"not a folder")
    with pytest.raises(StorageFullError, match="b64_json") as raised:
        put(storage)
    assert raised.value.param == "response_format"
    assert str(temporary) not in raised.value.message
    assert storage.get(name) is None


def test_a_missing_temporary_folder_is_reported(
    storage: ImageStorage, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nothing"))
    with pytest.raises(StorageFullError):
        put(storage)


def test_a_partly_written_file_is_removed(storage: ImageStorage, temporary: Path) -> None:
    put(storage)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(StorageFullError):
            put(storage, b"a" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.stat().st_size for file in folder_in(temporary).iterdir()] == [4]


def test_images_are_stored_again_after_the_folder_was_removed(storage: ImageStorage, temporary: Path) -> None:
    lost = put(storage)
    shutil.rmtree(folder_in(temporary))
    assert storage.get(lost) is None
    assert storage.get(put(storage))
