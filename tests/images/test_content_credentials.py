"""Content credentials: signed files are read back with the C2PA library."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypergen import __version__
from hypergen.config import EngineSettings
from hypergen.engine.image_writer import ImageWriter
from hypergen.errors import ConfigurationError
from hypergen.images import decoding
from hypergen.images.content_credentials import load_credentials
from hypergen.images.encoding import OUTPUT_FORMATS
from hypergen.images.saved_settings import read_settings
from hypergen.models import loading
from hypergen.request import InputImage
from tests.support.sync_engine import InlineEngine, make_request, make_settings

c2pa = pytest.importorskip("c2pa", reason="the package c2pa-python is not installed")

from tests.support.certificates import write_certificate  # noqa: E402  needs what c2pa-python needs

_PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
_TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


def settings(files: tuple[Path, Path]) -> EngineSettings:
    return EngineSettings.model_validate({"c2pa_certificate": files[0], "c2pa_key": files[1]})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("c2pa"))


def read(file: bytes, media_type: str) -> tuple[str, dict[str, Any]]:
    """The state of validation, and the active manifest."""
    with c2pa.Reader(media_type, BytesIO(file)) as reader:
        report = json.loads(reader.json())
        return reader.get_validation_state(), report["manifests"][report["active_manifest"]]


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
@pytest.mark.parametrize(("image", "source_type"), [(None, _TRAINED), (_PIXELS.tobytes(), _COMPOSITE)])
def test_a_signed_file_says_how_it_was_made(
    tmp_path: Path, certificate: tuple[Path, Path], output_format: Any, image: bytes | None, source_type: str
) -> None:
    given = None if image is None else InputImage(64, 64, image)
    request = make_request(output_format=output_format, output_compression=100, image=given)
    signed = ImageWriter("small", settings(certificate)).write(_PIXELS, request, 0)
    plain = ImageWriter("small", EngineSettings.model_validate({})).write(_PIXELS, request, 0)
    media_type = OUTPUT_FORMATS[output_format].media_type

    state, manifest = read(signed, media_type)
    assert state == "Valid"  # "Trusted" needs a list of authorities
    (actions,) = (each["data"] for each in manifest["assertions"] if each["label"] == "c2pa.actions.v2")
    (action,) = actions["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", source_type)
    generator = manifest["claim_generator_info"][0]
    assert (generator["name"], generator["version"]) == ("HyperGen", __version__)
    assert request.prompt not in json.dumps(manifest)

    # The rest of the file is the same, and it is an input image as any other.
    assert Image.open(BytesIO(signed)).tobytes() == Image.open(BytesIO(plain)).tobytes()
    (tmp_path / "signed").write_bytes(signed)
    (tmp_path / "plain").write_bytes(plain)
    assert read_settings(tmp_path / "signed") == read_settings(tmp_path / "plain")
    assert decoding.decode(signed, "image").size == (64, 64)
    assert len(signed) - len(plain) < 30_000  # no thumbnail


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_a_changed_pixel_is_detected(certificate: tuple[Path, Path], output_format: Any) -> None:
    request = make_request(output_format=output_format, metadata=False)
    writer = ImageWriter("small", settings(certificate))
    plain = ImageWriter("small", EngineSettings.model_validate({})).write(_PIXELS, request, 0)
    signed = bytearray(writer.write(_PIXELS, request, 0))
    # Bytes of the image data, which are the same in the file without a signature.
    position = bytes(signed).index(plain[-1000:-900])
    signed[position] ^= 1
    assert read(bytes(signed), OUTPUT_FORMATS[output_format].media_type)[0] == "Invalid"


def test_the_engine_signs_its_images(sd_folder: Path, certificate: tuple[Path, Path]) -> None:
    family = loading.load(sd_folder, make_settings())
    engine = InlineEngine(family, c2pa_certificate=certificate[0], c2pa_key=certificate[1])
    request = make_request(num_inference_steps=1)
    engine.run(request)
    assert read(engine.images[request.id][0].data, "image/png")[0] == "Valid"


def test_an_rsa_key_signs(tmp_path: Path) -> None:
    credentials = load_credentials(settings(write_certificate(tmp_path, rsa_key=True)))
    assert credentials is not None
    assert credentials.algorithm == "ps256"


def test_a_certificate_that_cannot_sign_is_refused_in_one_line(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    other = write_certificate(tmp_path / "other")
    text = tmp_path / "text.pem"
    text.write_text("no PEM")
    for files, words in (
        ((certificate[0], other[1]), "is not the key of"),
        ((tmp_path / "nosuch", certificate[1]), "nosuch cannot be read: No such file"),
        ((text, certificate[1]), "has no certificate in PEM"),
        ((certificate[0], text), "must be a private key in PEM"),
        (write_certificate(tmp_path / "self", self_signed=True), "cannot sign: .*self-signed"),
        (write_certificate(tmp_path / "old", days=-1), "cannot sign: "),
    ):
        with pytest.raises(ConfigurationError, match=words) as raised:
            load_credentials(settings(files))
        assert "\n" not in str(raised.value)


def test_certificate_and_key_are_given_together() -> None:
    with pytest.raises(ValueError, match="must be given together"):
        EngineSettings.model_validate({"c2pa_certificate": "chain.pem"})
