"""R8, R10: one run per output directory, and no other run's results are lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mytune.errors import DirectoryInUseError, ResourceError
from mytune.training import run_dir
from mytune.training.disk import check_disk_space, write_atomic
from mytune.training.run_dir import (
    LOCK,
    check_output_dir,
    output_dir_lock,
    take,
)

_HOLD = """
import sys, time
from mytune.training.run_dir import output_dir_lock
with output_dir_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def published(folder: Path, step: int = 1) -> Path:
    """A checkpoint that is ours by its manifest."""
    folder.mkdir(parents=True)
    manifest = {"format_version": 1, "step": step, "files": {}}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def test_a_second_run_is_refused_at_once_and_told_whose_it_is(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with output_dir_lock(out) as directory:
        assert directory == out
        begun = time.monotonic()
        told = f"pid {os.getpid()} on "
        with pytest.raises(DirectoryInUseError, match=told) as caught, output_dir_lock(out):
            pass
        assert time.monotonic() - begun < 1 and caught.value.exit_code == 7
    assert not (out / LOCK).exists()
    with output_dir_lock(out):
        pass


def test_the_lock_is_released_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), output_dir_lock(tmp_path):
        raise KeyError
    with output_dir_lock(tmp_path):
        pass


def test_a_killed_runs_lock_is_taken_over_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "locked\n"
        with (
            pytest.raises(DirectoryInUseError, match=f"pid {child.pid}"),
            output_dir_lock(tmp_path),
        ):
            pass
    finally:
        child.kill()
        child.wait()
    assert (tmp_path / LOCK).exists()
    with output_dir_lock(tmp_path):
        assert f"from a run that died (pid {child.pid}" in caplog.text


def test_a_lock_from_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere", "boot_id": "x"}')
    with pytest.raises(DirectoryInUseError, match="pid 1 on elsewhere"), output_dir_lock(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps({**run_dir._identity(), "boot_id": "before reboot"}))
    with output_dir_lock(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = output_dir_lock(tmp_path / "file" / "out")
    with (
        pytest.raises(
            ResourceError, match="is a file, or lies below one; choose another output_dir"
        ),
        below,
    ):
        pass
    if os.getuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(ResourceError, match="Permission denied"), output_dir_lock(tmp_path):
            pass


def test_results_of_another_run_are_not_mixed_with(tmp_path: Path) -> None:
    check_output_dir(tmp_path, resume=False, overwrite=False)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "epoch_3").mkdir()  # not ours: no manifest
    check_output_dir(tmp_path, resume=False, overwrite=False)
    published(tmp_path / "epoch_0")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DirectoryInUseError, match=r"\(epoch_0, metrics\.jsonl\)"):
        check_output_dir(tmp_path, resume=False, overwrite=False)
    check_output_dir(tmp_path, resume=True, overwrite=False)
    check_output_dir(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "epoch_0").is_dir()  # removed only once the new run is sure to start
    take(tmp_path, resume=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.safetensors", "epoch_3", ".mytune.taken"}


def test_a_folder_in_the_place_of_a_file_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "loss_curve.png").mkdir()
    with pytest.raises(ResourceError, match=r"loss_curve\.png is a folder"):
        check_output_dir(tmp_path, resume=True, overwrite=False)


def test_a_file_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ResourceError, match=r"cannot write in .*config\.yaml"):
        write_atomic(tmp_path / "config.yaml", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_overwriting_does_not_remove_what_the_run_reads(tmp_path: Path) -> None:
    base = published(tmp_path / "epoch_0")
    with pytest.raises(DirectoryInUseError, match="this run reads"):
        check_output_dir(tmp_path, resume=False, overwrite=True, inputs=[base])
    assert base.exists()


def test_room_on_the_disk_is_checked_for_directories_to_come(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match=r"a checkpoint needs 1099511627776\.00 GiB"):
        check_disk_space(tmp_path / "not" / "yet", 2**70)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".mytune.lock").symlink_to(precious)
    with pytest.raises(ResourceError, match="symbolic links"), output_dir_lock(run):
        pass
    assert precious.read_text() == "kept"
