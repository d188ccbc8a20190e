"""Content credentials of C2PA in image files, signed with the operator's certificate: https://c2pa.org."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from hypergen import __version__, optional_packages
from hypergen.config import EngineSettings
from hypergen.errors import SettingError

_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# A thumbnail would be larger than most images. The rest needs the network.
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"ocsp_fetch": False, "remote_manifest_fetch": False},
}


@dataclass(frozen=True)
class ContentCredentials:
    """Signs image files. Signatures of the same file differ, because they have a time and a random part.

    Args:
        chain: certificates in PEM, the signer's first.
        key: its private key, in PEM as PKCS#8.
        algorithm: as C2PA names it.
    """

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str

    def sign(self, file: bytes, media_type: str, *, composite: bool) -> bytes:
        """The file with a signed manifest, which says that a model generated it.

        Args:
            composite: parts of it are from an input image.
        """
        import c2pa

        source_type = "compositeWithTrainedAlgorithmicMedia" if composite else "trainedAlgorithmicMedia"
        action = {"action": "c2pa.created", "digitalSourceType": f"{_SOURCE_TYPES}{source_type}"}
        manifest: dict[str, Any] = {
            "claim_generator_info": [{"name": "HyperGen", "version": __version__}],
            "format": media_type,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = BytesIO()
        with (
            c2pa.Settings.from_dict(_SETTINGS) as settings,
            c2pa.Context(settings) as context,
            c2pa.Signer.from_info(c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, None)) as signer,
            c2pa.Builder(manifest, context) as builder,
        ):
            builder.sign(signer, media_type, BytesIO(file), signed)
        return signed.getvalue()


def load_credentials(settings: EngineSettings) -> ContentCredentials | None:
    """The operator's certificate and key, tested by signing a small image; None without them.

    Raises:
        SettingError: the package is missing, a file cannot be read, the key is not the certificate's,
            or the certificate is not fit for C2PA, for example because it is self-signed.
    """
    if settings.c2pa_certificate is None or settings.c2pa_key is None:
        return None
    optional_packages.require("c2pa", "c2pa_certificate")
    credentials = _read(settings.c2pa_certificate, settings.c2pa_key)
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    try:
        credentials.sign(file.getvalue(), "image/png", composite=False)
    except Exception as error:  # c2pa has a class for each reason
        reason = " ".join(str(error).split())
        raise SettingError(
            "c2pa_certificate", f"{settings.c2pa_certificate} cannot sign: {reason}."
        ) from None
    return credentials


def _read(certificate: Path, key: Path) -> ContentCredentials:
    # Dependencies of c2pa-python.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )

    texts: list[bytes] = []
    for setting, file in (("c2pa_certificate", certificate), ("c2pa_key", key)):
        try:
            texts.append(file.read_bytes())
        except OSError as error:
            raise SettingError(setting, f"{file} cannot be read: {error.strerror}.") from None
    try:
        leaf = x509.load_pem_x509_certificates(texts[0])[0]
    except ValueError:
        raise SettingError("c2pa_certificate", f"{certificate} has no certificate in PEM.") from None
    try:
        private = load_pem_private_key(texts[1], None)
    except (TypeError, ValueError):
        raise SettingError("c2pa_key", f"{key} must be a private key in PEM, without a password.") from None

    def public_bytes(public: Any) -> bytes:
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    if public_bytes(leaf.public_key()) != public_bytes(private.public_key()):
        raise SettingError("c2pa_key", f"{key} is not the key of {certificate}'s first certificate.")
    pkcs8 = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ContentCredentials(texts[0], pkcs8, _algorithm(private, key))


def _algorithm(private: Any, key: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    match private:
        case ec.EllipticCurvePrivateKey() if private.curve.name in curves:
            return curves[private.curve.name]
        case rsa.RSAPrivateKey():
            return "ps256"
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case _:
            raise SettingError("c2pa_key", f"{key} must be an ECDSA, RSA or Ed25519 key.")
