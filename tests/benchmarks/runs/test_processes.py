"""Who a process is among several, and claims that end with it."""

import errno
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import BenchmarkError
from benchmarks.runs.environment import ROOT
from benchmarks.runs.processes import Process, claimed, local_device, refuse_several, this_process, use_device


def test_without_torchrun_there_is_one_process():
    assert this_process({}) == this_process({"RANK": "3"}) == Process()
    assert Process().first and Process().alone


def test_torchruns_variables_are_read():
    found = this_process({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert found == Process(rank=5, world=8, local_rank=1, local_world=4)
    assert not found.first and not found.alone
    assert this_process({"RANK": "0", "WORLD_SIZE": "2"}).first


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", ""), ("0", "0")])
def test_variables_that_do_not_go_together_are_refused(rank, world):
    with pytest.raises(BenchmarkError, match="RANK < WORLD_SIZE"):
        this_process({"RANK": rank, "WORLD_SIZE": world})


def test_no_processes_on_a_machine_are_refused():
    with pytest.raises(BenchmarkError, match="LOCAL_WORLD_SIZE=0"):
        this_process({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"})


@pytest.mark.parametrize(
    ("text", "expected"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("xpu", "xpu:3")]
)
def test_every_process_has_an_accelerator_of_its_own(text, expected):
    assert local_device(text, Process(rank=11, world=16, local_rank=3)) == torch.device(expected)
    assert local_device(text, Process()) == torch.device(text)


def test_own_accelerator_becomes_the_current_one(fast_kernels, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(set_device=chosen.append))
    for text in ("cuda", "cuda:1", "cpu"):
        use_device(text, Process(rank=1, world=4, local_rank=2))
    use_device("cuda", Process())
    assert chosen == [2]


KERNELS = "benchmark", "deterministic", "allow_tf32"


def kernels():
    return *(getattr(torch.backends.cudnn, name) for name in KERNELS), torch.get_float32_matmul_precision()


@pytest.fixture
def fast_kernels():
    """What is fast and does not repeat; afterwards as before."""
    *flags, precision = kernels()
    for name, flag in zip(KERNELS, (True, False, True), strict=True):
        setattr(torch.backends.cudnn, name, flag)
    torch.set_float32_matmul_precision("high")
    yield
    for name, flag in zip(KERNELS, flags, strict=True):
        setattr(torch.backends.cudnn, name, flag)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("process", [Process(), Process(rank=1, world=2, local_rank=1)])
def test_accelerators_take_kernels_that_repeat(fast_kernels, monkeypatch, process):
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(set_device=lambda index: None))
    use_device("cpu", process)
    assert kernels() == (True, False, True, "high")
    use_device("xpu", process)
    assert kernels() == (False, True, False, "highest")


def test_single_commands_refuse_to_be_several():
    refuse_several("speed", Process())
    with pytest.raises(BenchmarkError, match="speed runs in one process, got WORLD_SIZE=2"):
        refuse_several("speed", Process(world=2))


def test_claim_is_one_processes_alone_and_ends_with_the_block(tmp_path):
    path = tmp_path / "rows" / ".a.lock"
    with claimed(path) as first, claimed(path) as second, claimed(tmp_path / "b") as other:
        assert (first, second, other) == (True, False, True)
        assert path.exists()
    assert not path.exists()
    with pytest.raises(KeyError), claimed(path) as again:
        assert again
        raise KeyError
    with claimed(path) as again:
        assert again


@pytest.mark.parametrize("replaced", [False, True])
def test_file_that_another_claim_has_deleted_claims_nothing(tmp_path, monkeypatch, replaced):
    """It is opened, its owner deletes it, perhaps a third process makes another, and only then it is locked."""
    fcntl = pytest.importorskip("fcntl")
    path, lock = tmp_path / "a.lock", fcntl.flock

    def late(*args):
        path.unlink()
        if replaced:
            path.touch()
        return lock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with claimed(path) as free:
            assert not free
    assert path.exists() == replaced
    with claimed(path) as free:
        assert free


def test_file_that_cannot_be_deleted_stays(tmp_path, monkeypatch):
    """As on Windows, which refuses to delete a file that is open."""

    def refuse(path, **options):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        with claimed(tmp_path / "a.lock") as free:
            assert free
    assert (tmp_path / "a.lock").exists()


def test_file_system_without_locks_is_an_error_of_the_user(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    with pytest.raises(BenchmarkError, match=r"a\.lock cannot be locked .*No locks"), claimed(tmp_path / "a.lock"):
        pass


def test_claim_of_a_killed_process_is_void(tmp_path):
    path = tmp_path / "a.lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom benchmarks.runs.processes import claimed\n"
        f"with claimed(Path({str(path)!r})) as free:\n    print(free, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with claimed(path) as free:
            assert not free
    finally:
        process.kill()
        process.communicate()
    for _ in range(100):  # the system takes its time
        with claimed(path) as free:
            if free:
                return
        time.sleep(0.02)
    raise AssertionError("the claim outlives its process")
