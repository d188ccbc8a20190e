"""What a name, a path or a tag is taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypergen.model_store import store
from tests.support.model_folders import make_model, message


def test_a_folder_comes_before_a_tag_and_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert store.ensure("owner/name").source == "owner/name"
    assert store.ensure("name").source == "owner/name"


@pytest.mark.parametrize("given", ["nothing", "no:such", "a/b/c", "", "owner/name:v1", "NAME:latest"])
def test_what_cannot_be_a_model_is_told_with_what_would_work(given: str, folder: Path):
    tag = store.ensure(str(folder)).tag
    text = message(store.ensure, given)
    assert f"'{given}'" in text
    assert "owner/name" in text
    assert tag in text


def test_missing_paths_are_told_as_such(tmp_path: Path):
    for given in (str(tmp_path / "none"), "./none", "../none", "~/none-of-mine", "~nobody-here/x"):
        assert message(store.ensure, given) == f"No such folder: {given}"


@pytest.mark.skipif(not (store.EMBEDDED_FOLDER / "model_index.json").is_file(), reason="not trained yet")
def test_the_embedded_model_is_the_default():
    assert store.ensure(None) == store.ensure("hypergen-tiny")
    assert store.ensure(None).source == "hypergen-tiny"
