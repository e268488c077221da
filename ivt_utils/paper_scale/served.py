"""A model behind an OpenAI-compatible API, every answer kept as it comes, and a student that answers there.

An answer is kept under the content of its request, so an interrupted run asks for nothing twice.
"""

import base64
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ivt_utils.methods import METHODS
from ivt_utils.runtime.files import ArtefactError, read_json, write_text
from ivt_utils.student import Student

RETRIES = 5  # of a request that met a full, failing or silent server: after 0.5, 1, 2, ... s, or its Retry-After
SIDE, FEWEST = 32, 65_536  # Qwen3-VL's processor: the sides of an image are multiples of the one, its pixels not fewer


def kept(cache: Path, key: str) -> str | None:
    """Return the answer that the cache holds to a request, or None; a damaged file counts as none."""
    try:
        answer = json.loads((Path(cache) / f"{key}.json").read_text(encoding="utf-8"))["answer"]
        return answer if isinstance(answer, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def data_url(image, kind: str, **options) -> str:
    """Return an image as a data URL of a kind, "JPEG" or "PNG", written with Pillow's options."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


class Endpoint:
    """A model behind an OpenAI-compatible API; the key comes from OPENAI_API_KEY and is written nowhere."""

    role = "teacher"  # in sentences, and in the names of the profile's values
    empty: tuple[str, ...] = ()  # errors that begin so count as an empty answer

    def __init__(self, profile, *, base_url: str, model: str, cache: Path):
        self.profile, self.base_url, self.model, self.cache = profile, base_url, model, Path(cache)
        self.workers, self.timeout = (getattr(profile, f"{self.role}_{value}") for value in ("workers", "timeout"))
        self.stopped, self.lock = threading.Event(), threading.Lock()
        try:
            import openai
        except ImportError:
            raise ArtefactError(f"A served {self.role} needs openai; run: pip install -e '.[teacher]'") from None
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # a server of one's own needs none
        if not key.isascii() or not key.isprintable():
            raise ArtefactError("OPENAI_API_KEY holds a character that no key has; set it again.")
        if not re.match(r"https?://[\w.\[:\]-]+(/|$)", base_url):
            raise ArtefactError(
                f"{base_url!r} is no address of a {self.role}; give one such as http://localhost:8000/v1."
            )
        try:
            self.client = openai.OpenAI(base_url=base_url, api_key=key, timeout=self.timeout, max_retries=RETRIES)
        except Exception as error:  # the HTTP library's own, such as an invalid port
            raise ArtefactError(f"{base_url!r} is no address of a {self.role} ({error}); correct it.") from None

    def text_of(self, message) -> str:
        """Return the text of an answer, by default "" where there is none."""
        return message.content if isinstance(message.content, str) else ""

    def answered(self, key: str, request: Callable[[], dict]) -> str | None:
        """Return the model's answer to a request: from the cache, or asked for and kept there.

        What is no chat completion (a web page, no choices) is None and not kept. An ArtefactError says what else went
        wrong.
        """
        answer = kept(self.cache, key)
        if answer is None:
            if self.stopped.is_set():
                raise CancelledError
            answer = self._ask(request())
            if answer is not None:
                with self.lock:
                    write_text(self.cache / f"{key}.json", json.dumps({"model": self.model, "answer": answer}))
        return answer

    def _ask(self, request: dict) -> str | None:
        import openai

        try:
            completion = self.client.chat.completions.create(model=self.model, **request)
        except json.JSONDecodeError:
            return None
        except openai.OpenAIError as error:
            if self.empty and str(getattr(error, "code", "")).startswith(self.empty):
                return ""
            raise self.trouble(self._complaint(error)) from error
        try:
            return self.text_of(completion.choices[0].message)
        except (AttributeError, IndexError, TypeError, KeyError):
            return None

    def trouble(self, complaint: str) -> ArtefactError:
        """Return the error whose sentence goes on with what went wrong and what to do."""
        return ArtefactError(
            f"The {self.role} at {self.base_url} {complaint}; what is finished is kept in {self.cache}, and the same "
            "command goes on."
        )

    def _complaint(self, error) -> str:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return (
                f"gave no answer within {self.timeout:g} seconds, {RETRIES + 1} times: raise "
                f"{self.role}_timeout, or lower {self.role}_workers"
            )
        if isinstance(error, openai.APIConnectionError):
            return "cannot be reached: start it, or correct its address"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return "refuses the key: set OPENAI_API_KEY to one that it accepts"
        if isinstance(error, openai.NotFoundError):
            return f"has no model {self.model!r}, or no API under this address (which often ends on /v1): correct them"
        if isinstance(error, openai.RateLimitError):
            return (
                f"takes no more requests, after {RETRIES + 1} tries: lower {self.role}_workers, or look at your quota"
            )
        reply = " ".join(getattr(getattr(error, "response", None), "text", "").split())
        reply = reply.replace(os.environ.get("OPENAI_API_KEY", "").strip() or "\0", "***")[:200].rstrip(".")
        return f"answers with the error {getattr(error, 'status_code', type(error).__name__)} ({reply}): correct that"


class StudentEndpoint(Endpoint):
    """A student behind the API. Its answers are texts as the model wrote them, or the run stops."""

    role = "student"

    def text_of(self, message) -> str:
        taken = any(getattr(message, part, None) for part in ("tool_calls", "reasoning", "reasoning_content"))
        if taken or not isinstance(message.content, str):
            raise self.trouble(
                f"gave an answer that is no plain text, for its server took calls or thoughts out of it, or lost it: "
                f"serve {self.model} without parsers of tools and reasoning, and without a response template"
            )
        return message.content

    def answers(self, chats: list[list[dict]], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        """Return the next answer of each chat, as `loop.generate` does, with `student_workers` requests at a time."""

        def answer(chat, number):
            request: dict = {
                "messages": [sent(message, self.profile.max_pixels) for message in chat],
                "max_completion_tokens": max_new_tokens,
                "temperature": temperature,
            }
            if temperature > 0:  # from all that the model may say next, also where the model came with a narrower habit
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                request |= {"seed": seed + number, "top_p": 1.0}
                request["extra_body"] = {"generation_config": json.dumps(sampling)}  # read by `transformers serve`
            key = hashlib.sha256(json.dumps([self.model, request]).encode()).hexdigest()
            text = self.answered(key, lambda: request)
            if text is None:
                raise self.trouble("gave no chat completion: look whether its address is that of an API")
            return text

        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = [pool.submit(answer, chat, number) for number, chat in enumerate(chats)]
            return [future.result() for future in futures]
        finally:  # requests that are under way are waited for, and their answers kept
            pool.shutdown(cancel_futures=True)


def served_profile(profile, model: str):
    """Return the profile of a run whose student answers behind an API, where it is called `model`.

    It has as many chats in a batch as requests at a time, and says nothing of precision, which only the server knows.
    """
    values = {"batch_size": profile.student_workers, "load_in_4bit": False, "eyes_in_16bit": False}
    return replace(profile, engine=f"served: {model}", **values)


def served_students(run, base_url: str, models: dict[str | None, str]) -> dict[str | None, Student]:
    """Return the students of a run by the adapters they carry, None for the base student.

    `models`: the names under which the server has them. The run notes each, and an ArtefactError says where one was
    another while a stage was answered, for the answers of two models are not compared. Further errors are those of
    `served_student`.
    """
    cache, note = run.root / "served", run.root / "served.json"
    noted = read_json(note) if note.exists() else {}
    answered = {method.adapter for name, method in METHODS.items() if f"rollouts/{name}" in run.stages()}
    for adapter, model in models.items():
        name = adapter or "base"
        if adapter in answered and noted.get(name, model) != model:
            raise ArtefactError(
                f"{run.root} holds answers of {noted[name]!r} for {name}, and {model!r} is another model: name another "
                "--run-dir."
            )
        noted[name] = model
    write_text(note, json.dumps(noted, indent=1))
    return {
        adapter: served_student(run.profile, base_url=base_url, model=model, cache=cache)
        for adapter, model in models.items()
    }


def served_student(profile, *, base_url: str, model: str, cache: Path) -> Student:
    """Return a student that answers behind an OpenAI-compatible API, where it is called `model`.

    ArtefactError where the address or the key cannot be one, or openai is missing.
    """
    endpoint = StudentEndpoint(profile, base_url=base_url, model=model, cache=cache)
    return Student(None, None, profile.grid, endpoint.answers)


def sent(message: dict, max_pixels: int) -> dict:
    """Return a message of a chat as the API takes it: the parts in their order, images as PNG."""

    def part(own):
        if own["type"] == "text":
            return {"type": "text", "text": own["text"]}
        return {"type": "image_url", "image_url": {"url": data_url(shrunk(own["image"], max_pixels), "PNG")}}

    return {"role": message["role"], "content": [part(own) for own in message["content"]]}


def shrunk(image, max_pixels: int):
    """Return an image in the size that Qwen3-VL's processor gives it under `max_pixels` (0: as it is).

    The server's own processor then has nothing to do, so that its settings change nothing.
    """
    if not max_pixels:
        return image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    size = smart_resize(image.height, image.width, SIDE, min(FEWEST, max_pixels), max_pixels)
    pixels = functional.pil_to_tensor(image)
    return functional.to_pil_image(functional.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True))
