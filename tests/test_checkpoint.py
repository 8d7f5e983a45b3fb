import errno
import io
import tracemalloc

import pytest
import torch

from ropepp_lit import checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import (
    ALiBi,
    FoPE,
    Frequencies,
    Linear,
    Llama3,
    NoPE,
    PartialRoPE,
    PoPE,
    PositionScheme,
    RoPE,
    RoPEPP,
    Yarn,
    YarnByRotations,
)


@pytest.mark.parametrize(
    ("instance", "base"),
    [
        (RoPE(), PositionScheme),
        (RoPEPP(variant="eh"), PositionScheme),
        (PartialRoPE(partial_rotary_factor=0.5), PositionScheme),
        (FoPE(context_length=512), PositionScheme),
        (ALiBi(), PositionScheme),
        (NoPE(), PositionScheme),
        (PoPE(phase_init="uniform"), PositionScheme),
        (Frequencies(rope_theta=7e5), Frequencies),
        (Linear(factor=3), Frequencies),
        (YarnByRotations(rope_theta=2e4, factor=32, beta_fast=20, original_max_position_embeddings=100), Frequencies),
        (Yarn(factor=4, truncate=False, attention_factor=1.5), Frequencies),
        (Llama3(factor=32, low_freq_factor=2), Frequencies),
    ],
    ids=lambda value: type(value).__name__,
)
def test_describe_and_instantiate(instance, base):
    description = checkpoint.describe(instance)
    again = checkpoint.instantiate(description, base)
    assert type(again) is type(instance)
    assert vars(again) == vars(instance)
    assert checkpoint.describe(again) == description


@pytest.mark.parametrize("class_path", ["os.system", "ropepp_lit.nn.positions.RoPEPP2", "ropepp_lit.nn.config.SIZES"])
def test_classes_of_a_checkpoint_are_restricted(class_path):
    with pytest.raises(UsageError):
        checkpoint.instantiate({"class_path": class_path, "init_args": {}}, PositionScheme)


def test_trust_allows_one_class_with_the_required_base():
    description = {"class_path": "os.system", "init_args": {}}
    with pytest.raises(UsageError, match=r"if you trust that code .* --trust os\.system"):
        checkpoint.instantiate(description, PositionScheme, trust="os.path")
    with pytest.raises(UsageError, match=r"os\.system is not a PositionScheme"):
        checkpoint.instantiate(description, PositionScheme, trust="os.system")


def test_a_file_is_streamed(tmp_path):
    tensors = {str(number): torch.zeros(2**20) for number in range(8)}
    tracemalloc.start()
    checkpoint.save_file(tensors, tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size > 32 * 2**20
    assert peak < 2**20


def test_a_pointer_of_git_lfs_is_no_checkpoint(tmp_path):
    (tmp_path / "model.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UsageError, match=r"model\.ckpt: a git-lfs pointer, not the file; run `git lfs pull` in "):
        checkpoint.read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_cause_of_a_failed_write_is_raised(error):
    """torch's archive writer raises a second error after it."""

    class File(io.BytesIO):
        def write(self, content):
            if self.tell() > 1000:
                raise error
            return super().write(content)

    class Path:
        def open(self, mode):
            return File()

    with pytest.raises(type(error)):
        checkpoint.save_file({"weights": torch.zeros(1000)}, Path())
