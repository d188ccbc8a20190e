"""The sample code of the documents, run against a server with the embedded model.

Only the URL and the key are replaced. Most samples run concurrently, and the tests check their results.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageChops

from tests.support.live_server import LiveServer
from tests.support.packages import ROOT, node_packages

SAMPLES = Path(__file__).parent / "samples"
KEY = "sk-hypergen-123456"
MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
# Samples of a body only; the rest of the code is that of the basic sample.
BODY_SAMPLES = ("hyperbolic_loras", "hyperbolic_negative", "hyperbolic_seed")
RUN_BY_A_TEST = ("generations_reproducible", "hyperbolic_decoding", "models_integration")
_DATA = re.compile(r"^data = \{.*?^\}", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class SampleRun:
    """The output of a sample, and the folder of its files."""

    printed: str
    folder: Path

    def image(self, name: str = "generated_image.png") -> Image.Image:
        with Image.open(self.folder / name) as image:
            assert image.format == "PNG"
            return image.convert("RGB")


@pytest.fixture(scope="module")
def server(documented_server: LiveServer) -> LiveServer:
    return documented_server


@pytest.fixture(scope="module")
def ran(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SampleRun]:
    """The runs of all samples, by name."""
    folder = tmp_path_factory.mktemp("samples")
    with ThreadPoolExecutor(32) as threads:
        files = [file for file in sorted(SAMPLES.iterdir()) if file.suffix in (".py", ".sh")]
        running = {
            file.stem: threads.submit(run, file, folder / file.stem, server)
            for file in files
            if file.stem not in RUN_BY_A_TEST
        }
        return {name: sample.result() for name, sample in running.items()}


def run(file: Path, folder: Path, server: LiveServer) -> SampleRun:
    folder.mkdir()
    code = file.read_text(encoding="utf-8")
    if file.stem in BODY_SAMPLES:
        basic = (SAMPLES / "hyperbolic_basic.py").read_text(encoding="utf-8")
        assert len(_DATA.findall(basic)) == 1
        code = _DATA.sub(lambda _: code.strip(), basic)
    if file.stem == "hyperbolic_image_to_image":
        Image.radial_gradient("L").convert("RGB").save(folder / "input_image.png")
    script = folder / file.name
    script.write_text(replace_url_and_key(code, server), encoding="utf-8")
    program = "bash" if file.suffix == ".sh" else sys.executable
    done = subprocess.run([program, str(script)], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{file.name}: {done.stderr[-2000:]}"
    return SampleRun(done.stdout, folder)


def replace_url_and_key(code: str, server: LiveServer) -> str:
    """The sample with this server's URL and key."""
    for url in ("http://localhost:8000", "https://api.hyperbolic.xyz"):
        code = code.replace(url, server.url)
    return code.replace("YOUR_API_KEY", KEY).replace("<authorization>", f"Bearer {KEY}")


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


def test_the_curl_samples_return_the_requested_images(ran: dict[str, SampleRun]) -> None:
    basic = json.loads(ran["generations_basic"].printed)
    (item,) = basic["data"]
    assert item["revised_prompt"] == "A cat holding a sign that says Hello World"
    assert item["b64_json"]
    assert item["url"].endswith(".png")
    advanced = json.loads(ran["generations_advanced"].printed)
    assert [item["seed"] for item in advanced["data"]] == [42, 43]
    assert advanced["size"] == "1024x768"


def test_the_sample_with_placeholders_gets_an_error(ran: dict[str, SampleRun]) -> None:
    error = json.loads(ran["generations_template"].printed)
    assert error["error"]["param"] == "n"
    assert error["detail"] == error["error"]["message"]


def test_the_openai_sample_prints_a_working_url(ran: dict[str, SampleRun]) -> None:
    url = ran["generations_openai"].printed.strip()
    response = httpx.get(url)
    assert response.headers["content-type"] == "image/png"


def test_the_batch_sample_writes_four_images(ran: dict[str, SampleRun]) -> None:
    images = [ran["generations_batch"].image(f"landscape_{number}.png") for number in range(4)]
    assert {image.size for image in images} == {(1024, 1024)}
    assert differ(images[0], images[1])


def test_the_same_seed_gives_identical_images(server: LiveServer, tmp_path: Path) -> None:
    code = (SAMPLES / "generations_reproducible.py").read_text(encoding="utf-8")
    comparison = "print(response1.json()['data'] == response2.json()['data'])"
    script = f"{replace_url_and_key(code, server)}\n{comparison}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_the_recommended_settings_are_accepted(server: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for body in json.loads((SAMPLES / "generations_recommended.json").read_text(encoding="utf-8")):
        response = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=120)
        assert response.status_code == 200, response.text
        assert response.json()["size"] == body["size"]


def test_hyperbolics_samples_write_their_images(ran: dict[str, SampleRun]) -> None:
    for name in ("hyperbolic_basic", *BODY_SAMPLES):
        assert ran[name].image().size == (1024, 1024)
    assert ran["hyperbolic_image_to_image"].image("transformed_image.png").size == (1024, 1024)
    assert ran["hyperbolic_lora"].image("pixel_cat.png").size == (1024, 1024)


def test_the_decoding_sample_decodes_a_response(server: LiveServer, tmp_path: Path) -> None:
    code = (SAMPLES / "hyperbolic_decoding.py").read_text(encoding="utf-8")
    body = {"model_name": "SD1.5", "prompt": "a red circle", "steps": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{server.url}/v1/image/generation", json=body, headers=headers, timeout=120)
    names: dict[str, object] = {}
    exec(code, names)
    save_image = names["save_image"]
    assert callable(save_image)
    save_image(response.json(), str(tmp_path / "output.png"))
    assert SampleRun("", tmp_path).image("output.png").size == (256, 256)


def test_loras_change_the_image(server: LiveServer) -> None:
    """The samples have no seed, so their own images always differ."""
    headers = {"Authorization": f"Bearer {KEY}"}
    images: list[str] = []
    for name in ("hyperbolic_lora", "hyperbolic_loras"):
        names: dict[str, dict[str, object]] = {}
        (block,) = _DATA.findall((SAMPLES / f"{name}.py").read_text(encoding="utf-8"))
        exec(block, names)
        for lora in (names["data"]["lora"], {}):
            body = {**names["data"], "lora": lora, "seed": 3, "steps": 8, "height": 128, "width": 128}
            response = httpx.post(
                f"{server.url}/v1/image/generation", json=body, headers=headers, timeout=120
            )
            images.append(response.json()["images"][0]["image"])
    assert len(set(images)) == 4


def test_the_model_samples_find_the_served_model(ran: dict[str, SampleRun]) -> None:
    assert json.loads(ran["models"].printed)["data"][0]["id"] == MODEL
    assert f"Model ID: {MODEL}" in ran["models_openai"].printed
    assert "Owned by: hypergen" in ran["models_openai"].printed
    assert ran["models_discovery"].printed.strip() == f"Server is running: {MODEL}"
    assert ran["models_validation"].printed.strip() == f"Correct model loaded: {MODEL}"
    assert ran["models_client"].printed.strip() == f"Connected to: {MODEL}"


def test_the_test_in_the_documents_passes(server: LiveServer) -> None:
    code = (SAMPLES / "models_integration.py").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(replace_url_and_key(code, server), names)
    test = names["test_correct_model_loaded"]
    assert callable(test)
    test()


def test_the_node_sample_lists_the_model(server: LiveServer, tmp_path: Path) -> None:
    node = node_packages(ROOT / "examples")
    code = (SAMPLES / "models_openai.mjs").read_text(encoding="utf-8")
    script = tmp_path / "models.mjs"
    script.write_text(replace_url_and_key(code, server), encoding="utf-8")
    (tmp_path / "node_modules").symlink_to(ROOT / "examples" / "node_modules")
    done = subprocess.run([node, str(script)], capture_output=True, text=True, timeout=60)
    assert f"Model ID: {MODEL}" in done.stdout, done.stderr


def test_a_wrong_key_gets_the_documented_error(server: LiveServer) -> None:
    curl = shutil.which("curl")
    assert curl
    code = replace_url_and_key((SAMPLES / "models.sh").read_text(encoding="utf-8"), server).replace(
        KEY, "sk-wrong"
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["detail"] == "Invalid API key"
