"""`FAMILIES`: every entry names an importable family, and families do not import each other."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import diffusers
import pytest

from hypergen.model_families import FAMILIES, FamilySpec
from hypergen.models.family import Family


def _module(spec: FamilySpec) -> str:
    return spec.implementation.partition(":")[0]


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES.keys())
def test_an_entry_names_a_family_and_pipelines_of_diffusers(spec: FamilySpec) -> None:
    family = spec.import_class()
    assert issubclass(family, Family)
    assert family.spec is spec
    assert all(hasattr(diffusers, pipeline) for pipeline in spec.pipelines)


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES.keys())
def test_families_do_not_import_each_other(spec: FamilySpec) -> None:
    found = importlib.util.find_spec(_module(spec))
    assert found is not None
    assert found.origin is not None
    nodes = ast.walk(ast.parse(Path(found.origin).read_text(encoding="utf-8")))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not imported & set(map(_module, FAMILIES.values()))
