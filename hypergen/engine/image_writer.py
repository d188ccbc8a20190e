"""From decoded pixels to the file that the client gets: passed by the content filter, encoded and signed."""

from __future__ import annotations

import numpy as np

from hypergen.config import EngineSettings
from hypergen.images import encoding
from hypergen.images.content_credentials import load_credentials
from hypergen.models.safety_checker import load_safety_checker
from hypergen.request import GenerationRequest


class ImageWriter:
    """Writes the files of one model's images, in any thread.

    Raises:
        ConfigurationError: the certificate cannot sign, or the content filter cannot be loaded.
    """

    def __init__(self, model_id: str, settings: EngineSettings) -> None:
        self._model_id = model_id
        self._credentials = load_credentials(settings)
        source = settings.safety_checker
        self._safety_checker = None if source is None else load_safety_checker(source)

    def write(self, pixels: np.ndarray, request: GenerationRequest, index: int) -> bytes:
        """The file of image `index` of a request; see `encoding.finished_image`.

        Raises:
            ContentPolicyError: the content filter refused the image.
        """
        image = encoding.finished_image(pixels, request)
        if self._safety_checker is not None:
            self._safety_checker.check(image, request.prompt)
        file = encoding.encode_finished(image, request, index, self._model_id)
        if self._credentials is None:
            return file
        media_type = encoding.OUTPUT_FORMATS[request.output_format].media_type
        return self._credentials.sign(file, media_type, composite=request.image is not None)
