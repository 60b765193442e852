"""The process that runs a vLLM engine for `vllm_backend.VLLMSampler`: how it is started, and what it does.

It reads messages from the connection whose file descriptor is its argument: first the options of `vllm.LLM`, then
lists of (prompt token ids, options of `vllm.SamplingParams`). Each is answered by (failed, answer). The process ends
when the other end of the connection is closed, as it is when the parent dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection, Pipe


def start_worker(on_gpu: bool) -> tuple[subprocess.Popen, Connection]:
    """The worker's process, which has loaded nothing yet, and the parent's end of the connection to it."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        # Errors come back as exceptions; the rest is a page of notes on every start.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
    if not on_gpu:
        # The sampler's compiled kernels need a C++ compiler and many seconds, and save nothing here.
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment |= os.environ
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in the worker itself
    ours, theirs = Pipe()
    with contextlib.closing(theirs):
        process = subprocess.Popen(
            [sys.executable, "-m", "shared.generation.vllm_worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    return process, ours


def stop_worker(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()  # the worker ends by itself when it sees that
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the connection
    # vLLM leaves files when it is killed; here they go with the process.
    directory = tempfile.mkdtemp(prefix="vllm_")
    tempfile.tempdir = os.environ["TMPDIR"] = directory
    # Some of its messages come before vLLM applies this itself.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    connection = Connection(int(sys.argv[1]))
    messages: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages, directory), daemon=True).start()
    llm = None
    while True:
        message = messages.get()
        try:
            if llm is None:
                from vllm import LLM

                llm = LLM(**message)
                answer = llm.model_config.max_model_len
            else:
                answer = _generate(llm, message)
        except Exception as error:
            connection.send((True, f"{type(error).__name__}: {error}"))
        else:
            connection.send((False, answer))


def _receive(connection: Connection, messages: queue.SimpleQueue, directory: str) -> None:
    """Pass messages on; when there can be no more, delete `directory` and end the process, even while generating."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, ConnectionError):
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)  # at once: vLLM takes ten seconds for an orderly end


def _generate(llm, rows: list[tuple[list[int], dict]]) -> list[tuple[list[int], list[float] | None, str]]:
    """(token ids, logprobs, finish reason) for each row."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in rows],
        [SamplingParams(**options) for _, options in rows],
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        (completion,) = output.outputs
        token_ids = list(completion.token_ids)
        logprobs = completion.logprobs
        if logprobs is not None:
            logprobs = [step[token].logprob for step, token in zip(logprobs, token_ids, strict=True)]
        answers.append((token_ids, logprobs, completion.finish_reason))
    return answers


if __name__ == "__main__":
    main()
