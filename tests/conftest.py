import os
import signal
import sys

import pytest
import torch

# Triton reads this when it is first imported, which any test module may cause. On a CPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What a script starts in the background ignores these signals, and so do its children. Some tests stop processes with
# them, as a person at a terminal does.
for signum, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, default)


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate():
    """Each test module finds accelerate as a new process does. It keeps the first trainer's settings for the whole
    process, and refuses others; which modules share a process, xdist decides."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def llama_chat(tmp_path_factory):
    """Directory of a tiny chat model in the format of Llama 3.1: see `tests/tiny_chat.py`."""
    from tests.tiny_chat import chat_checkpoint

    return chat_checkpoint(tmp_path_factory.mktemp("llama_chat"), "llama")


@pytest.fixture(scope="session")
def qwen_chat(tmp_path_factory):
    """Directory of a tiny chat model in the format of Qwen 3."""
    from tests.tiny_chat import chat_checkpoint

    return chat_checkpoint(tmp_path_factory.mktemp("qwen_chat"), "qwen")


@pytest.fixture(scope="session")
def reward_checkpoint(tmp_path_factory):
    """Directory of a tiny random reward model in the format of Athene-RM-8B."""
    from tests.tiny_chat import reward_checkpoint

    return reward_checkpoint(tmp_path_factory.mktemp("reward_model"))


@pytest.fixture(scope="session")
def pair_checkpoint(tmp_path_factory):
    """Directory of a tiny random classifier of pairs of texts, a ModernBERT with two outputs."""
    from tests.tiny_chat import pair_checkpoint

    return pair_checkpoint(tmp_path_factory.mktemp("pair_classifier"))
