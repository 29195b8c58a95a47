"""A connection without a network, and folders of comparisons without calls."""

import asyncio
import json

from mrss_provider.compare.calls import CallError, Piece, Result
from mrss_provider.compare.folder import Folder, Settings
from mrss_provider.compare.prompts import read_prompts


class FakeConnection:
    """Answers what `answers` says: a text by model, an exception, or a function of the call."""

    def __init__(self, answers):
        self.answers = answers
        self.calls = []
        self.num_open = self.most_open = 0
        self.is_closed = False

    async def stream(self, call):
        self.calls.append(call)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            answer = self.answers[call.model]
            if callable(answer):
                answer = answer(call)
            # Others may begin in between.
            await asyncio.sleep(0)
            if isinstance(answer, BaseException):
                raise answer
            yield Piece(model_id=f"id-of-{call.model}")
            for word in answer.split(" "):
                yield Piece(text=f"{word} ")
            num_tokens = answer.count(" ") + 1
            yield Piece(finish_reason="stop", prompt_tokens=3, completion_tokens=num_tokens)
        finally:
            self.num_open -= 1

    async def aclose(self):
        self.is_closed = True


FULL = CallError("RateLimitError", "the queue is full", 429)


def write_prompts(path, num_prompts, **fields):
    lines = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"Question {i}?"}], **fields}
        for i in range(num_prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_folder(tmp_path, models, num_prompts=3, seeds=(0,), **fields):
    prompts = write_prompts(tmp_path / "prompts.jsonl", num_prompts, **fields)
    settings = Settings(
        models=tuple(models), seeds=tuple(seeds), prompts_sha256=read_prompts(prompts).sha256
    )
    return Folder.begin(tmp_path / "run", settings, prompts)


def result(prompt, model, seed=0, text="yes", ttft_s=0.1, step_s=0.02, num_tokens=5, **fields):
    """Return an answer with the times that are given."""
    chunk_s = tuple(ttft_s + i * step_s for i in range(num_tokens))
    return Result(
        prompt=prompt,
        model=model,
        seed=seed,
        started=1.0,
        text=text,
        finish_reason="stop",
        ttft_s=ttft_s,
        total_s=chunk_s[-1],
        chunk_s=chunk_s,
        completion_tokens=num_tokens,
        **fields,
    )
