"""How a name, path or tag is resolved to a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypergen.model_store import store
from tests.support.model_folders import error_message, make_model


def test_a_folder_has_precedence_over_a_tag_and_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert store.get_or_import("owner/name").source == "owner/name"
    assert store.get_or_import("name").source == "owner/name"


@pytest.mark.parametrize("given", ["nothing", "no:such", "a/b/c", "", "owner/name:v1", "NAME:latest"])
def test_the_error_for_an_unknown_model_lists_accepted_values(given: str, folder: Path):
    tag = store.get_or_import(str(folder)).tag
    text = error_message(store.get_or_import, given)
    assert f"'{given}'" in text
    assert "owner/name" in text
    assert tag in text


def test_missing_paths_are_reported(tmp_path: Path):
    for given in (str(tmp_path / "none"), "./none", "../none", "~/none-of-mine", "~nobody-here/x"):
        assert error_message(store.get_or_import, given) == f"No such folder: {given}"


@pytest.mark.skipif(not (store.EMBEDDED_FOLDER / "model_index.json").is_file(), reason="not trained yet")
def test_the_embedded_model_is_the_default():
    assert store.get_or_import(None) == store.get_or_import("hypergen-tiny")
    assert store.get_or_import(None).source == "hypergen-tiny"
