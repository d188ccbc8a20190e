"""From decoded pixels to the file that the client gets, signed if the operator has a certificate."""

from __future__ import annotations

import numpy as np

from hypergen.config import EngineSettings
from hypergen.images import encoding
from hypergen.images.content_credentials import load_credentials
from hypergen.request import GenerationRequest


class ImageWriter:
    """Writes the files of one model's images, in any thread.

    Raises:
        ConfigurationError: the certificate of the settings cannot sign.
    """

    def __init__(self, model_id: str, settings: EngineSettings) -> None:
        self._model_id = model_id
        self._credentials = load_credentials(settings)

    def write(self, pixels: np.ndarray, request: GenerationRequest, index: int) -> bytes:
        """The file of image `index` of a request; see `encoding.encode_image`."""
        file = encoding.encode_image(pixels, request, index, self._model_id)
        if self._credentials is None:
            return file
        media_type = encoding.OUTPUT_FORMATS[request.output_format].media_type
        return self._credentials.sign(file, media_type, composite=request.image is not None)
