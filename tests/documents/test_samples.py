"""The documents' sample code, run as it stands there against a server of the embedded model.

Only address and key are put in. Most samples run at once, and the tests look at what came of them.
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
# These say only what the body is; the rest of the code is that of the basic sample.
BODIES_ALONE = ("hyperbolic_loras", "hyperbolic_negative", "hyperbolic_seed")
RUN_BY_A_TEST = ("generations_reproducible", "hyperbolic_decoding", "models_integration")
_DATA = re.compile(r"^data = \{.*?^\}", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Ran:
    """What a sample printed, and the folder that it wrote into."""

    printed: str
    folder: Path

    def picture(self, name: str = "generated_image.png") -> Image.Image:
        with Image.open(self.folder / name) as image:
            assert image.format == "PNG"
            return image.convert("RGB")


@pytest.fixture(scope="module")
def server(documented_server: LiveServer) -> LiveServer:
    return documented_server


@pytest.fixture(scope="module")
def ran(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Every sample, by its name."""
    folder = tmp_path_factory.mktemp("samples")
    with ThreadPoolExecutor(32) as threads:
        files = [file for file in sorted(SAMPLES.iterdir()) if file.suffix in (".py", ".sh")]
        running = {
            file.stem: threads.submit(run, file, folder / file.stem, server)
            for file in files
            if file.stem not in RUN_BY_A_TEST
        }
        return {name: sample.result() for name, sample in running.items()}


def run(file: Path, folder: Path, server: LiveServer) -> Ran:
    folder.mkdir()
    code = file.read_text(encoding="utf-8")
    if file.stem in BODIES_ALONE:
        basic = (SAMPLES / "hyperbolic_basic.py").read_text(encoding="utf-8")
        assert len(_DATA.findall(basic)) == 1
        code = _DATA.sub(lambda _: code.strip(), basic)
    if file.stem == "hyperbolic_image_to_image":
        Image.radial_gradient("L").convert("RGB").save(folder / "input_image.png")
    script = folder / file.name
    script.write_text(put_in(code, server), encoding="utf-8")
    program = "bash" if file.suffix == ".sh" else sys.executable
    done = subprocess.run([program, str(script)], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{file.name}: {done.stderr[-2000:]}"
    return Ran(done.stdout, folder)


def put_in(code: str, server: LiveServer) -> str:
    """The sample with this server's address and key."""
    for address in ("http://localhost:8000", "https://api.hyperbolic.xyz"):
        code = code.replace(address, server.url)
    return code.replace("YOUR_API_KEY", KEY).replace("<authorization>", f"Bearer {KEY}")


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


def test_curl_draws_what_the_samples_ask_for(ran: dict[str, Ran]) -> None:
    basic = json.loads(ran["generations_basic"].printed)
    (item,) = basic["data"]
    assert item["revised_prompt"] == "A cat holding a sign that says Hello World"
    assert item["b64_json"]
    assert item["url"].endswith(".png")
    advanced = json.loads(ran["generations_advanced"].printed)
    assert [item["seed"] for item in advanced["data"]] == [42, 43]
    assert advanced["size"] == "1024x768"


def test_the_sample_of_all_fields_names_what_its_placeholders_are_not(ran: dict[str, Ran]) -> None:
    error = json.loads(ran["generations_template"].printed)
    assert error["error"]["param"] == "n"
    assert error["detail"] == error["error"]["message"]


def test_openais_client_gets_an_address_that_opens(ran: dict[str, Ran]) -> None:
    address = ran["generations_openai"].printed.strip()
    picture = httpx.get(address)
    assert picture.headers["content-type"] == "image/png"


def test_four_pictures_are_written(ran: dict[str, Ran]) -> None:
    pictures = [ran["generations_batch"].picture(f"landscape_{number}.png") for number in range(4)]
    assert {picture.size for picture in pictures} == {(1024, 1024)}
    assert differ(pictures[0], pictures[1])


def test_the_same_seed_gives_identical_images(server: LiveServer, tmp_path: Path) -> None:
    code = (SAMPLES / "generations_reproducible.py").read_text(encoding="utf-8")
    told = "print(response1.json()['data'] == response2.json()['data'])"
    script = f"{put_in(code, server)}\n{told}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_the_recommended_settings_are_taken(server: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for body in json.loads((SAMPLES / "generations_recommended.json").read_text(encoding="utf-8")):
        response = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=120)
        assert response.status_code == 200, response.text
        assert response.json()["size"] == body["size"]


def test_hyperbolics_samples_write_their_pictures(ran: dict[str, Ran]) -> None:
    for name in ("hyperbolic_basic", *BODIES_ALONE):
        assert ran[name].picture().size == (1024, 1024)
    assert ran["hyperbolic_image_to_image"].picture("transformed_image.png").size == (1024, 1024)
    assert ran["hyperbolic_lora"].picture("pixel_cat.png").size == (1024, 1024)


def test_the_decoding_sample_reads_an_answer(server: LiveServer, tmp_path: Path) -> None:
    code = (SAMPLES / "hyperbolic_decoding.py").read_text(encoding="utf-8")
    body = {"model_name": "SD1.5", "prompt": "a red circle", "steps": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/v1/image/generation", json=body, headers=headers, timeout=120)
    names: dict[str, object] = {}
    exec(code, names)
    save_image = names["save_image"]
    assert callable(save_image)
    save_image(answer.json(), str(tmp_path / "output.png"))
    assert Ran("", tmp_path).picture("output.png").size == (256, 256)


def test_loras_change_the_picture(server: LiveServer) -> None:
    """The samples give no seed, so that their own pictures would differ in any case."""
    headers = {"Authorization": f"Bearer {KEY}"}
    drawn: list[str] = []
    for name in ("hyperbolic_lora", "hyperbolic_loras"):
        names: dict[str, dict[str, object]] = {}
        (block,) = _DATA.findall((SAMPLES / f"{name}.py").read_text(encoding="utf-8"))
        exec(block, names)
        for lora in (names["data"]["lora"], {}):
            body = {**names["data"], "lora": lora, "seed": 3, "steps": 8, "height": 128, "width": 128}
            answer = httpx.post(f"{server.url}/v1/image/generation", json=body, headers=headers, timeout=120)
            drawn.append(answer.json()["images"][0]["image"])
    assert len(set(drawn)) == 4


def test_the_samples_on_models_find_the_served_one(ran: dict[str, Ran]) -> None:
    assert json.loads(ran["models"].printed)["data"][0]["id"] == MODEL
    assert f"Model ID: {MODEL}" in ran["models_openai"].printed
    assert "Owned by: hypergen" in ran["models_openai"].printed
    assert ran["models_discovery"].printed.strip() == f"Server is running: {MODEL}"
    assert ran["models_validation"].printed.strip() == f"Correct model loaded: {MODEL}"
    assert ran["models_client"].printed.strip() == f"Connected to: {MODEL}"


def test_the_documents_own_test_passes(server: LiveServer) -> None:
    code = (SAMPLES / "models_integration.py").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(put_in(code, server), names)
    test = names["test_correct_model_loaded"]
    assert callable(test)
    test()


def test_the_sample_for_node_lists_the_model(server: LiveServer, tmp_path: Path) -> None:
    node = node_packages(ROOT / "examples")
    code = (SAMPLES / "models_openai.mjs").read_text(encoding="utf-8")
    script = tmp_path / "models.mjs"
    script.write_text(put_in(code, server), encoding="utf-8")
    (tmp_path / "node_modules").symlink_to(ROOT / "examples" / "node_modules")
    done = subprocess.run([node, str(script)], capture_output=True, text=True, timeout=60)
    assert f"Model ID: {MODEL}" in done.stdout, done.stderr


def test_a_wrong_key_gets_the_documents_answer(server: LiveServer) -> None:
    curl = shutil.which("curl")
    assert curl
    code = put_in((SAMPLES / "models.sh").read_text(encoding="utf-8"), server).replace(KEY, "sk-wrong")
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["detail"] == "Invalid API key"
