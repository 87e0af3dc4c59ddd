import pytest
import torch

from baselines.files import atomic_path, digest_tensors


def test_interrupted_write_leaves_the_old_file_alone(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def interrupted():
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_digests_tell_apart():
    values = torch.arange(6.0)
    digests = [
        digest_tensors({"a": values}),
        digest_tensors({"b": values}),
        digest_tensors({"a": values.view(2, 3)}),
        digest_tensors({"a": values.double()}),
        digest_tensors({"a": values + 1}),
    ]
    assert len(set(digests)) == len(digests)
    assert digest_tensors({"a": values, "b": values[0]}) == digest_tensors({"b": values[0], "a": values.clone()})
