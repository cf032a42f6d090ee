"""R2-R5, R10: the last good checkpoint is never lost, whatever happens while another is written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mytune.errors import CheckpointError, NumericalError, ResourceError
from mytune.training.checkpointing import files, publish
from mytune.training.checkpointing.checkpointers import FullModelHFCheckpointer
from mytune.training.checkpointing.publish import clean_up, prune, verify
from mytune.training.run_dir import output_dir_lock
from tests.checkpointing import tiny


class Run:
    """Saves the same weights under different names, as a run would."""

    def __init__(self, hf_dir: Path, out: Path, config: Any, **arguments: Any) -> None:
        self.out, self.config = out, config
        self.checkpointer = FullModelHFCheckpointer(str(hf_dir), output_dir=str(out), **arguments)
        self.weights = dict(self.checkpointer.weights(config))

    def save(self, name: str, step: int, **more: Any) -> Path:
        return self.checkpointer.save(
            name,
            step=step,
            dtype=torch.float32,
            weights=self.weights,
            config=self.config,
            tensors={"momentum": torch.full((3,), float(step))},
            state={"step": step},
            **more,
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir())


@pytest.fixture
def run(hf_dir: Path, tmp_path: Path) -> Run:
    return Run(hf_dir, tmp_path / "out", tiny.SIZES)


def corrupt(file: Path) -> None:
    """Turn one byte, leaving size and time as they are."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_checkpoint_gives_back_what_a_run_needs(run: Run) -> None:
    run.save("step_7", 7, run={"samples_seen": 28, "world_size": 1})
    found = run.checkpointer.latest()
    assert found is not None
    assert (found.step, found.state, found.path.name) == (7, {"step": 7}, "step_7")
    assert torch.equal(found.tensors()["momentum"], torch.full((3,), 7.0))
    weights = found.weights(run.config)
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.weights.items())
    manifest = found.manifest
    assert manifest["run"] == {"samples_seen": 28, "world_size": 1}
    described = manifest["files"]["model.safetensors"]["tensors"]
    assert described["model.norm.weight"] == "float32 [32]"
    assert set(manifest["files"]) == {
        str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()
    } - {"MANIFEST.json"}


def test_the_newest_is_the_one_with_most_steps(run: Run) -> None:
    for name, step in (("step_9", 9), ("epoch_0", 10), ("step_100", 100), ("step_20", 20)):
        run.save(name, step)
    found = run.checkpointer.latest()
    assert found is not None and found.path.name == "step_100"


@pytest.mark.parametrize(
    ("named", "step"),
    [
        ("epoch_0", 1),
        ("epoch_0/recipe_state", 1),
        ("two_step_1/epoch_0", 1),
        ("recipe_state.pt", 2),
    ],
)
def test_recipe_checkpoint_names_the_one_to_resume_from(
    named: str, step: int, hf_dir: Path, tmp_path: Path
) -> None:
    run = Run(hf_dir, tmp_path / "out", tiny.SIZES, recipe_checkpoint=named)
    for saved in (1, 2):
        run.save(f"epoch_{saved - 1}", saved)
    found = run.checkpointer.latest()
    assert found is not None and found.step == step
    with pytest.raises(CheckpointError, match="has no checkpoint epoch_7"):
        Run(hf_dir, run.out, tiny.SIZES, recipe_checkpoint="epoch_7").checkpointer.latest()


def test_a_run_from_an_older_checkpoint_sets_newer_ones_aside_and_goes_on_from_its_own(
    hf_dir: Path, tmp_path: Path
) -> None:
    old = Run(hf_dir, tmp_path / "out", tiny.SIZES)
    for saved in (1, 2, 3):
        old.save(f"epoch_{saved - 1}", saved)
    for step in (2, 3):  # stopped after the first, then started anew with the same command
        branch = Run(hf_dir, old.out, tiny.SIZES, recipe_checkpoint="epoch_0")
        found = branch.checkpointer.latest()
        assert found is not None and found.step == step - 1
        branch.checkpointer.set_aside_newer()
        branch.save(f"step_{step}", step)
        own = [f"step_{n}" for n in range(2, step + 1)]
        names = [re.sub("[0-9a-f]{32}", "", name) for name in branch.names()]
        assert names == ["epoch_0", "epoch_1.kept-", "epoch_2.kept-", *own]
    newest = Run(hf_dir, old.out, tiny.SIZES).checkpointer.latest()
    assert newest is not None and newest.path.name == "step_3"


def test_a_step_that_a_manifest_got_wrong_is_noticed(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.save("step_1", 1)
    manifest = run.save("step_6", 6) / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"step": 6', '"step": 7'))
    found = run.checkpointer.latest()
    assert found is not None and found.step == 1
    assert "is of step 7, recipe_state/state.json of step 6" in caplog.text


def test_what_the_run_reads_is_not_removed(hf_dir: Path, tmp_path: Path) -> None:
    first = Run(hf_dir, tmp_path / "out", tiny.SIZES)
    base = first.save("epoch_0", 1)
    run = Run(base, first.out, tiny.SIZES, keep_last_n_checkpoints=1)
    for step in (2, 3, 4):
        run.save(f"epoch_{step - 1}", step)
    assert run.names() == ["epoch_0", "epoch_3"]


def test_a_draft_of_a_small_file_is_removed_by_the_next_run(run: Run) -> None:
    run.save("step_1", 1)
    (run.out / ".config.yaml.tmp-123").touch()
    with output_dir_lock(run.out):
        assert run.names() == [".mytune.lock", "step_1"]


@pytest.mark.parametrize("file", ["model.safetensors", "recipe_state/optimizer.safetensors"])
def test_a_corrupt_byte_makes_resume_fall_back_with_a_warning(
    file: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.save("step_1", 1)
    corrupt(run.save("step_2", 2) / file)
    found = run.checkpointer.latest()
    assert found is not None and found.step == 1
    assert f"step_2: {file} is corrupt" in caplog.text


def test_a_missing_manifest_or_file_makes_resume_fall_back_with_a_warning(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.save("step_1", 1)
    (run.save("step_2", 2) / "MANIFEST.json").unlink()
    (run.save("step_3", 3) / "config.json").unlink()
    manifest = run.save("step_4", 4) / "MANIFEST.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": ["hf"]}))
    found = run.checkpointer.latest()
    assert found is not None and found.step == 1
    assert "step_2: " in caplog.text and "step_3: config.json is missing" in caplog.text
    assert "step_4: its format is ['hf']" in caplog.text


def test_when_no_checkpoint_is_usable_all_are_named(run: Run) -> None:
    assert run.checkpointer.latest() is None
    for step in (1, 2):
        corrupt(run.save(f"step_{step}", step) / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of the checkpoints") as caught:
        run.checkpointer.latest()
    assert len(caught.value.details) == 2


def test_old_checkpoints_are_pruned_and_the_newest_stays(hf_dir: Path) -> None:
    run = Run(hf_dir, hf_dir.parent / "out", tiny.SIZES, keep_last_n_checkpoints=2)
    for step in (5, 10, 20, 100):
        run.save(f"step_{step}", step)
    assert run.names() == ["step_100", "step_20"]


@pytest.mark.parametrize(("best", "left"), [(3, [3, 4, 5]), (4, [4, 5]), (1, [4, 5])])
def test_the_checkpoint_with_the_lowest_loss_stays(
    hf_dir: Path, best: int, left: list[int]
) -> None:
    run = Run(hf_dir, hf_dir.parent / "out", tiny.SIZES)
    for step in (2, 3, 4, 5):
        run.save(f"step_{step}", step)
    prune(run.out, 2, [run.out / "step_5"], {1: 0.5, 3: 0.4, 4: 0.3} | {best: 0.1})
    assert run.names() == [f"step_{step}" for step in left]


class Failing:
    """Fails the nth call of the functions that a save makes durable with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        self.left = nth
        monkeypatch.setattr(files.os, "fsync", self.wrap(os.fsync))
        monkeypatch.setattr(publish.os, "rename", self.wrap(os.rename))
        write = files.HashedFile.write
        monkeypatch.setattr(files.HashedFile, "write", self.wrap(write, method=True))

    def wrap(self, function: Any, method: bool = False) -> Any:
        def counted(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments)

        return counted


def test_a_disk_that_fails_at_any_moment_costs_only_the_new_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save("step_1", 1)
    for nth in range(1, 1000):
        with monkeypatch.context() as patch:
            failing = Failing(patch, nth)
            try:
                run.save("step_1" if nth % 2 else "step_2", 1 if nth % 2 else 2)
            except ResourceError as error:
                assert error.exit_code == 5 and "No space left" in str(error)
            else:
                assert failing.left > 0
                break
        assert all(name in ("step_1", "step_2") for name in run.names())
        assert verify(run.out / "step_1") == []
        found = run.checkpointer.latest()
        assert found is not None and found.state == {"step": found.step}
    assert nth > 30


def _save_for_ever(hf_dir: Path, out: Path, config: Any, told: Any) -> None:
    with output_dir_lock(out):
        run = Run(hf_dir, out, config, keep_last_n_checkpoints=2)
        found = run.checkpointer.latest()
        step = found.step if found else 0
        while True:
            told.send(step)
            step += 1
            run.save(f"step_{step}", step)


def test_a_run_killed_anywhere_finds_a_good_checkpoint_again(hf_dir: Path, tmp_path: Path) -> None:
    out, fork, last = tmp_path / "out", multiprocessing.get_context("fork"), 0
    for kill in range(8):
        here, there = fork.Pipe()
        child = fork.Process(target=_save_for_ever, args=(hf_dir, out, tiny.SIZES, there))
        child.start()
        try:
            for step in (last, last + 1):
                assert here.poll(60)
                assert here.recv() == step
            time.sleep(0.007 * kill)
        finally:
            child.kill()
            child.join()
        with output_dir_lock(out):
            found = Run(hf_dir, out, tiny.SIZES).checkpointer.latest()
        assert found is not None and found.step > last
        last = found.step
    assert 1 <= len(list(out.iterdir())) <= 3


def test_what_a_killed_run_had_completed_is_published_and_the_rest_removed(run: Run) -> None:
    complete, half = (run.save(f"step_{n}", n) for n in (1, 2))
    complete.rename(run.out / f"step_1.tmp-{'0' * 32}")
    (half / "MANIFEST.json").unlink()
    half.rename(run.out / f"step_2.tmp-{'1' * 32}")
    run.save("step_3", 3).rename(run.out / f"step_3.del-{'2' * 32}")
    (run.out / "notes.tmp-mine").mkdir()
    clean_up(run.out)
    assert run.names() == ["notes.tmp-mine", "step_1"]
    assert verify(run.out / "step_1") == []


def test_a_checkpoint_of_the_same_name_is_replaced_or_kept_if_it_is_the_same(run: Run) -> None:
    first = run.save("step_1", 1, run={"config_hash": "a"}).stat().st_ino
    assert run.save("step_1", 1, run={"config_hash": "a"}).stat().st_ino == first
    run.weights["norm.weight"] = run.weights["norm.weight"] * 2
    run.save("step_1", 1, run={"config_hash": "b"})
    found = run.checkpointer.latest()
    assert found is not None
    assert torch.equal(found.weights(run.config)["norm.weight"], run.weights["norm.weight"])
    assert run.names() == ["step_1"]


def test_a_directory_of_that_name_that_is_not_ours_is_kept(run: Run) -> None:
    (run.out / "epoch_0").mkdir(parents=True)
    (run.out / "epoch_0" / "thesis.txt").write_text("precious")
    run.save("epoch_0", 1)
    assert [p.read_text() for p in run.out.glob("epoch_0.kept-*/thesis.txt")] == ["precious"]


def test_a_disk_without_room_is_told_before_writing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save("step_1", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(ResourceError, match=r"0\.00 MiB free"):
        run.save("step_2", 2)
    assert run.names() == ["step_1"]


def test_weights_that_are_not_finite_are_not_saved(run: Run) -> None:
    run.save("step_1", 1)
    run.weights["norm.weight"] = torch.full((32,), float("nan"))
    with pytest.raises(NumericalError, match=r"norm\.weight holds NaN or Inf"):
        run.save("step_2", 2)
    assert run.names() == ["step_1"]


def test_a_file_that_reads_back_differently_is_no_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save("step_1", 1)
    monkeypatch.setattr(publish, "verify", lambda path: ["model.safetensors is corrupt"])
    with pytest.raises(ResourceError, match="reads back differently"):
        run.save("step_1", 1)
    monkeypatch.undo()
    assert run.names() == ["step_1"] and verify(run.out / "step_1") == []


def test_weights_are_asked_for_in_the_announced_order(run: Run) -> None:
    asked: list[str] = []

    class Recorded(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return super().__getitem__(name)

    run.weights = Recorded(run.weights)
    run.save("step_1", 1)
    assert asked == run.checkpointer.plan(run.config, torch.float32).read
    assert sorted(asked) == sorted(run.weights)
