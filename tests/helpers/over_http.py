"""Servers as a user starts them: a command, a port, requests over HTTP, and the log they leave."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

STARTS_WITHIN = 600  # seconds; half a minute on an idle machine


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, health: str, log: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """Runs a server until the block is left; fails with the end of its log where it does not come up. Whatever it writes where
    it was started (LitServe a client) is beside its log."""
    with log.open("wb") as output:
        options = {"env": {**os.environ, **variables}, "cwd": log.parent, "start_new_session": True}
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not _answers(f"http://127.0.0.1:{port}{health}"):
            ended = process.poll() is not None
            assert not ended and time.monotonic() < deadline, log.read_text(errors="replace")[-5000:]
            time.sleep(1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def post(port: int, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error}: {error.read()[:1000]!r}") from error


def picture(seed: int, size: tuple[int, int] = (100, 80)) -> Image.Image:
    """Of a few smooth patches of colour."""
    few = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(few).resize(size)


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# Of a chat's messages
IMAGES = [[picture(0)], [picture(1, (40, 170))], [picture(2), picture(3, (64, 64))]]


def content(images: Sequence[Image.Image]) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]


def chat(images: Sequence[Image.Image]) -> tuple[str, dict]:
    """The request for 24 greedy tokens, and the five best log probabilities of each."""
    greedy = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": True, "top_logprobs": 5}
    message = {"role": "user", "content": [*content(images), {"type": "text", "text": "What is it?"}]}
    return "/v1/chat/completions", {"messages": [message], **greedy}


def tokens(answer: dict) -> tuple[list[str], np.ndarray]:
    """The tokens, and of each the five best log probabilities."""
    steps = answer["choices"][0]["logprobs"]["content"]
    return [step["token"] for step in steps], np.array([[top["logprob"] for top in s["top_logprobs"]] for s in steps])
