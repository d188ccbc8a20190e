"""The names of settings, and in messages the place where the user gave each."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hypergen.config import Settings
from hypergen.errors import ConfigurationError, SettingError
from hypergen.served_model_config import ModelEntry, file_of_entry

PREFIX = "HYPERGEN_"
# Not in messages, nor in a Bento.
SECRETS = ("api_key", "jobs")
# Setting -> its name in a served-model file.
_IN_ENTRY = {"lora": "loras", "embedding": "embeddings"}
_Location = tuple[int | str, ...]


def option_name(field: str) -> str:
    """The name of a setting in flags and the environment: the field without its unit of seconds."""
    return field.removesuffix("_s")


def flag_of(field: str) -> str:
    return f"--{option_name(field).replace('_', '-')}"


def variable_of(field: str) -> str:
    return PREFIX + option_name(field).upper()


def fields(model: type[BaseModel] = Settings) -> Iterator[tuple[str | None, str, FieldInfo]]:
    """Every setting as (section, name, field); the section is None at the top level."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for _, inner, inner_field in fields(field.annotation):
                yield name, inner, inner_field
        else:
            yield None, name, field


class _Found(NamedTuple):
    """
    Attributes:
        place: file and line, or the variable of models, as the start of a message.
        name: with its section.
        given: the flag, variable or argument that gave it; None: a file.
    """

    place: str
    name: str
    given: str | None = None


@dataclass(frozen=True)
class SettingNames:
    """
    Attributes:
        given_as: field -> the flag, variable or argument that gave it.
        file: of the settings.
        in_file: fields that it has.
        models: the setting of this name, whose entries may be files of their own.
        flag_loras: names of LoRAs that a flag gave, beside those of the file.
    """

    given_as: Mapping[str, str]
    file: Path | None
    in_file: frozenset[str]
    models: Any
    flag_loras: frozenset[str] = frozenset()

    @contextmanager
    def in_messages(self, settings: Settings) -> Generator[None]:
        """Name the settings that do not fit as the user wrote them.

        Args:
            settings: with these names.

        Raises:
            ConfigurationError: instead of a `SettingError`.
        """
        try:
            yield
        except SettingError as error:
            raise ConfigurationError(self._of_unfit(error, settings)) from None

    def of_invalid(self, error: ValidationError) -> str:
        """One line: which setting is wrong, as the user wrote it, and why."""
        first = error.errors(include_url=False)[0]
        found = self._find(first["loc"])
        if first["type"] == "extra_forbidden":
            fields_of = fields(ModelEntry if _is_in_entry(first["loc"]) else Settings)
            known = [name if section is None else f"{section}.{name}" for section, name, _ in fields_of]
            return f"{found.place}Unknown setting '{found.name}'{nearest(found.name, known)}"
        hidden = first["input"] is None or found.name.rpartition(".")[2] in ("models", *SECRETS)
        value = "" if hidden else f" (given: {first['input']!r})"
        shown = found.given or f"Setting '{found.name}'"
        return f"{found.place}{shown}: {first['msg'].removeprefix('Value error, ')}{value}."

    def _of_unfit(self, error: SettingError, settings: Settings) -> str:
        index = error.model
        entry = settings.models[index] if index is not None and settings.models else ModelEntry()
        name = _IN_ENTRY.get(error.setting, error.setting)
        value = getattr(entry, name, None)
        if isinstance(value, Mapping):
            in_entry = error.item in value if error.item else bool(value)
        else:
            in_entry = value is not None
        sections = {name: section for section, name, _ in fields()}
        of_model = ""
        if in_entry:
            found = self._find(("models", index or 0, name), error.item)
            if name == "source":  # a MODEL of the command line has no name
                return f"{found.place}{error.reason.removeprefix(': ')}"
        elif error.setting not in sections:  # what a model's own file states
            found = _Found("", error.setting)
        elif (
            error.setting not in (*self.given_as, *self.in_file)  # the default does not fit
            or (error.setting == "lora" and error.item in self.flag_loras)
        ):
            found = _Found("", error.setting, flag_of(error.setting))
        else:
            section = sections[error.setting]
            location = (error.setting,) if section is None else (section, error.setting)
            found = self._find(location, error.item)
            if index is not None and len(settings.models) > 1:
                of_model = f"{entry.name or entry.source}: "
        return f"{of_model}{found.place}{error.named(found.given or found.name)}"

    def _find(self, location: _Location, item: str | None = None) -> _Found:
        """
        Args:
            item: of a setting with named values, for the line.
        """
        given = next(filter(None, (self.given_as.get(str(part)) for part in location[:2])), None)
        file = self.file if given is None else None
        if _is_in_entry(location) and (model_file := file_of_entry(self.models, int(location[1]))):
            file, location, given = model_file, location[2:], None
        name = ".".join(str(part) for part in location)
        place = _place(file, location if item is None else (*location, item)) if file else ""
        if given is not None and location[0] == "models":  # MODEL is no flag, and may have fields
            place, given = "" if given == flag_of("models") else f"{given}: ", None
        return _Found(place, name, given)


def _is_in_entry(location: _Location) -> bool:
    return location[0] == "models" and len(location) > 1 and isinstance(location[1], int)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known names like this one, also without their section: "port" is "server.port"."""
    inner = {other.rpartition(".")[2]: other for other in known}
    found = [inner[name]] if name in inner else get_close_matches(name, inner.values(), 2, 0.75)
    if not found:
        last = get_close_matches(name.rpartition(".")[2], inner, 2, 0.6)
        found = [inner[other] for other in last]
    return f"; did you mean {' or '.join(found)}?" if found else "."


def _place(file: Path, location: tuple[int | str, ...]) -> str:
    """The file and the line of a setting, as the start of a message."""
    node: Any = yaml.compose(file.read_text(encoding="utf-8"))
    line = 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            pair = (node.value[part], node.value[part])
        else:
            pair = None
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return f"{file}, line {line}: " if line else f"{file}: "
