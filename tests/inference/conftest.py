import pytest
from others import make_folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A model with a chat template and a context of 512 tokens."""
    return make_folder("chat", tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A model without a chat template, whose tokenizer writes bytes as tokens."""
    return make_folder("llama2", tmp_path_factory.mktemp("models") / "llama2", max_position_embeddings=96)
