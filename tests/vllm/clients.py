"""Run by vLLM's interpreter: eight openai clients at once; questions as JSON on stdin, answers on stdout.

`{"url": ..., "model": ..., "tokens": most of an answer, "questions": [[text, picture as a data URL], ...]}`
"""

import asyncio
import json
import sys

from openai import AsyncOpenAI

CLIENTS = 8


async def main(requests):
    """Every client has a connection of its own and takes the next question when it has its answer."""
    waiting, answers = list(enumerate(requests["questions"])), {}

    async def client():
        async with AsyncOpenAI(base_url=f"{requests['url']}/v1", api_key="none", timeout=120, max_retries=0) as server:
            while waiting:
                place, (text, url) = waiting.pop()
                parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
                messages = [{"role": "user", "content": parts}]
                answer = await server.chat.completions.create(
                    model=requests["model"], messages=messages, max_tokens=requests["tokens"], temperature=0, seed=0
                )
                answers[place] = answer.choices[0].message.content

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return [answers[place] for place in sorted(answers)]


print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
