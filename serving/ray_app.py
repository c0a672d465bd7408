"""Ray Serve application: replicas of `mmq serve`, each with its own engine, behind one HTTP address.

    serve run serving/ray.yaml       # from the top of the repository, in an environment with ray[serve]

A replica starts `mmq serve`, so flags, chat template and plugin are right for the artifact. It is ready only after its
engine has answered a question rightly. Needs ray[serve]; `mmq` may be in another environment (`program`).
"""

import ctypes
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serving import smoke

HOP_BY_HOP = frozenset(("connection", "content-length", "host", "transfer-encoding"))
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def _end_with_parent() -> None:
    """Let the kernel stop this process when the replica's process ends, also if it is killed."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@serve.deployment
class EngineReplica:
    """One engine.

    artifact: folder. arguments: further arguments of `mmq serve`. question, expect: sent with a picture of a red square
    (or the picture `image`) before the replica takes requests; its answer must contain `expect`.
    """

    def __init__(
        self, artifact: str, arguments: Sequence[str], program: str, question: str, expect: str, image: str | None
    ) -> None:
        words = [program, "serve", artifact, "--port", "0", "--json", *arguments]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=_end_with_parent)
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"`{' '.join(words)}` ended with {self._process.wait()}; its log is in the replica's")
        self._url = str(json.loads(line)["url"])
        model = smoke.wait_until_up(self._url, 60)
        answer = smoke.ask(self._url, model, question, smoke.data_url(image), 120)
        if expect.lower() not in answer.lower():
            self._process.terminate()
            raise RuntimeError(f"the engine answers '{answer}' to '{question}', expected '{expect}'")

    def check_health(self) -> None:
        """Called by Ray; an error lets it replace the replica."""
        if self._process.poll() is not None:
            raise RuntimeError(f"mmq serve ended with {self._process.returncode}")

    async def __call__(self, request: Request) -> Response:
        """Forward a request to the engine, and its response in pieces as they come."""
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600))
        headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
        query = f"?{request.url.query}" if request.url.query else ""
        try:
            reply = await session.request(
                request.method, f"{self._url}{request.url.path}{query}", data=await request.body(), headers=headers
            )
        except BaseException:
            await session.close()
            raise

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in reply.content.iter_any():
                    yield piece
            finally:
                await session.close()

        kept = {name: value for name, value in reply.headers.items() if name.lower() not in HOP_BY_HOP}
        return StreamingResponse(pieces(), status_code=reply.status, headers=kept)

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.terminate()


def app(settings: Mapping[str, Any]) -> Any:
    """The application from `args` of ray.yaml. ValueError without `expect`: then any answer would be right."""
    if not settings.get("expect"):
        raise ValueError("args.expect is missing: a part of the right answer to args.question")
    deployment: Any = EngineReplica
    return deployment.bind(
        settings["artifact"],
        settings.get("arguments", ()),
        settings.get("program", "mmq"),
        settings.get("question", smoke.QUESTION),
        settings["expect"],
        settings.get("image"),
    )
