"""Folders of the cache are complete or absent, and worker processes start without torch."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from train.config import DataConfig
from train.data.cache import atomic_folder, folder_lock
from train.data.errors import DataError
from train.data.load import load
from train.data.processes import process_map
from train.data.sources import decode
from train.data.sources.listing import read_listing


def test_an_interrupted_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "set", 10) as temporary:
            (temporary / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="bytes free for images"), atomic_folder(tmp_path / "set", 1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """The temporary folder of a process that is still running is kept."""
    script = (
        "import sys; from pathlib import Path; from train.data.cache import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), 1) as temporary:\n"
        "    (temporary / 'part').write_text('…'); print(flush=True); input()"
    )

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "made")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        return process

    killed = start()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    working = start()
    (leftover,) = tmp_path.iterdir()  # of the second process, which removed that of the first
    with atomic_folder(tmp_path / "made", 1):
        assert leftover.is_dir()
    assert working.communicate("\n")[0] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["part"]


def run_together(script: str, *arguments: str, count: int = 4) -> list[str]:
    """Start processes at once, and return what each prints. All of them must succeed."""
    prologue = "import os, sys\nfrom pathlib import Path\nsys.stdin.readline()\n"
    command = [sys.executable, "-c", prologue + script, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * count, [errors for _, errors in said]
    return [output for output, _ in said]


def test_processes_that_replace_a_folder_at_once(tmp_path: Path) -> None:
    """Under the lock, each process sees a whole folder all the time; without it, the folder is whole in the end."""
    script = (
        "from contextlib import nullcontext; from train.data.cache import atomic_folder, folder_lock\n"
        "folder, lock = Path(sys.argv[1]), folder_lock if sys.argv[2] == 'locked' else lambda _: nullcontext()\n"
        "for round in range(40):\n"
        "    with lock(folder):\n"
        "        with atomic_folder(folder, 1) as temporary:\n"
        "            for part in 'ab': (temporary / part).write_text(f'{os.getpid()} {round}')\n"
        "        if sys.argv[2] == 'locked':\n"
        "            assert {(folder / part).read_text() for part in 'ab'} == {f'{os.getpid()} {round}'}\n"
    )
    for kind in ("locked", "free"):
        run_together(script, str(tmp_path / kind / "set"), kind)
        assert [path.name for path in (tmp_path / kind).iterdir()] == ["set"]
        assert len({path.read_text() for path in (tmp_path / kind / "set").iterdir()}) == 1


def test_processes_that_draw_one_dataset_at_once(tmp_path: Path) -> None:
    """One process draws the images, and all processes get them."""
    script = (
        "import zlib, matplotlib; from train.data.glyphs import dataset; from train.data.glyphs.plan import Rule\n"
        "real, drawn = dataset._draw_dataset, []\n"
        "dataset._draw_dataset = lambda *a: (drawn.append(1), real(*a))\n"
        "fonts = [Path(matplotlib.get_data_path(), 'fonts', 'ttf', name) for name in ('DejaVuSans.ttf', 'cmr10.ttf')]\n"
        "families = {'train': ('DejaVu Sans',), 'val': ('cmr10',), 'test': ('cmr10',)}\n"
        "rule = Rule(num_classes=26, largest=6, families=families, fewest_families=1)\n"
        "letters = dict.fromkeys('ABCDEFGHIJKLMNOPQRSTUVWXYZ', 5)\n"
        "made = dataset.load_glyphs(12, Path(sys.argv[1]), letters, fonts, rule)\n"
        "print(len(drawn), len(made.arrays['x_train']), zlib.crc32(made.arrays['x_train'].tobytes()))"
    )
    said = [line.split() for line in run_together(script, str(tmp_path))]
    assert sorted(drawn for drawn, _, _ in said) == ["0", "0", "0", "1"]
    assert len({(number, checksum) for _, number, checksum in said}) == 1


def test_runs_that_load_images_at_once(tree: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "train" / "ant" / "0.png").write_bytes(b"no image")
    listing, decoded, real = read_listing(str(tree / "train")), [], decode._decode_all

    def count(*arguments: Any) -> list[tuple[int, str]]:
        decoded.append(1)
        return real(*arguments)

    monkeypatch.setattr(decode, "_decode_all", count)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: decode.load_images(listing, 8, Path(cache)), range(4)))
    assert len(decoded) == 1
    for images, rows, errors in loaded:
        assert torch.equal(images, loaded[0][0])
        assert rows == [1, 2, 3, 4, 5, 6, 7, 8]
        assert len(errors) == 1


def test_a_lock_excludes_threads_and_leaves_no_file(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with folder_lock(tmp_path / "set"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(30)))
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / ".set.lock").symlink_to(tmp_path / "elsewhere")
    with folder_lock(tmp_path / "set"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_damaged_folder_is_made_again(tree: Path, cache: str) -> None:
    """A power failure may lose the end of a file."""
    source = DataConfig(data=str(tree), image_size=8, cache=cache)
    whole = load(source).fingerprint()
    for name, content in (("done.json", ""), ("images.u8", "short")):
        for file in Path(cache).rglob(name):
            file.write_text(content)
        assert load(source).fingerprint() == whole
    for file in Path(cache).rglob("images.u8"):
        file.unlink()
    assert load(source).fingerprint() == whole


def test_a_cache_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--cache: expected a folder that can be written, got .*file"):
        load(DataConfig(data=str(tree), image_size=8, cache=str(tmp_path / "file" / "cache")))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become a user without a home folder")
def test_without_a_home_folder_the_cache_must_be_given() -> None:
    """Containers may run a numeric user id that their /etc/passwd lacks."""
    script = (
        "import os, pwd, train.data.cache as cache\n"
        "os.environ.pop('HOME', None)\n"
        "os.setuid(next(i for i in range(54321, 65000) if i not in {user.pw_uid for user in pwd.getpwall()}))\n"
        "try: print(cache.cache_folder('/c'), cache.cache_folder(''))\n"
        "except cache.DataError as error: print(error)\n"
    )
    (said,) = run_together(script, count=1)
    assert said == "--cache: expected a folder, as there is no home folder, got none\n"


def test_a_disk_that_fills_up(tree: Path, cache: str) -> None:
    """A limit on the size of files acts like a full disk: one line says so, and nothing is left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            DataError, match=r"--cache: expected a folder with 6,912 bytes free for images, got \[Errno 27\]"
        ):
            load(DataConfig(data=str(tree), image_size=16, cache=cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(Path(cache).iterdir()) == []


def test_a_worker_process_that_the_system_ends() -> None:
    with (
        pytest.raises(DataError, match="got one that the system ended, as when memory runs out"),
        process_map(1, serial=False) as each,
    ):
        list(each(os._exit, [1]))


def test_one_worker_process_per_processor_that_a_scheduler_gives() -> None:
    """Slurm gives a job some processors of a machine by their affinity."""
    mine, others = os.sched_getaffinity(0), set(multiprocessing.active_children())  # of tests before
    os.sched_setaffinity(0, {min(mine)})
    try:
        with process_map(None, serial=False) as each:
            assert list(each(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
            assert len(set(multiprocessing.active_children()) - others) == 1
    finally:
        os.sched_setaffinity(0, mine)


def test_a_daemonic_process_works_alone() -> None:
    """Python forbids it to start processes, as in the workers of multiprocessing's and Celery's pools."""
    script = (
        "import multiprocessing, train.data.processes\n"
        "def work():\n"
        "    with train.data.processes.process_map(2, serial=False) as each: print(list(each(abs, [-1, 2])))\n"
        "process = multiprocessing.get_context('fork').Process(target=work, daemon=True)\n"
        "process.start()\n"
        "process.join()\n"
    )
    assert run_together(script, count=1) == ["[1, 2]\n"]


def test_worker_processes_do_not_run_the_users_script(tmp_path: Path) -> None:
    """A script that trains at its top level, without `if __name__ == "__main__"`, would wait for itself."""
    script = tmp_path / "script.py"
    script.write_text(
        "from train.data.processes import process_map\n"
        "print('began', flush=True)\n"
        "with process_map(2, serial=False) as each:\n"
        "    print(list(each(abs, [-1, -2, 3])), __file__ is not None, __spec__)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout == "began\n[1, 2, 3] True None\n", done.stderr


def test_modules_of_worker_processes_do_not_import_torch() -> None:
    script = (
        "import sys, train.data.cache, train.data.processes, train.data.glyphs.dataset, train.data.sources.image_files\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
