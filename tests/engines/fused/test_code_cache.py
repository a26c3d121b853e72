"""The cache of machine code: which folders and files it trusts, and what a crash leaves."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from swamp_fast.engines.fused.cuda import code_cache

NAME, CODE = "kernel-sm_90-00.cubin", bytes(range(256)) * 100


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SWAMP_FAST_CACHE", str(tmp_path / "cache"))
    code_cache._warn_once.cache_clear()
    return tmp_path / "cache"


def test_a_new_folder_and_its_files_are_the_users_alone(folder):
    before = os.umask(0)
    try:
        code_cache.write(NAME, CODE)
    finally:
        os.umask(before)
    assert code_cache.read(NAME) == CODE
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_not_used_and_replaced(folder):
    code_cache.write(NAME, CODE)
    whole = (folder / NAME).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:10], whole[:-1], whole + b"\0", bytes(len(whole)), bytes(flipped), CODE):
        (folder / NAME).write_bytes(damaged)
        assert code_cache.read(NAME) is None
        code_cache.write(NAME, CODE)
        assert code_cache.read(NAME) == CODE


def test_a_renamed_file_is_not_another_kernel(folder):
    code_cache.write(NAME, CODE)
    (folder / NAME).rename(folder / "other.cubin")
    assert code_cache.read("other.cubin") is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(folder, mode):
    code_cache.write(NAME, CODE)
    folder.chmod(mode)
    with pytest.warns(UserWarning, match=r"neither read from nor kept in .*cache: other users may write it .* go-w"):
        assert code_cache.read(NAME) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        code_cache.write("new.cubin", CODE)
        assert code_cache.read(NAME) is None
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_what_belongs_to_another_user_is_not_used(folder, monkeypatch):
    code_cache.write(NAME, CODE)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="it belongs to another user"):
        assert code_cache.read(NAME) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_used(folder):
    code_cache.write(NAME, CODE)
    os.chown(folder / NAME, 12345, -1)
    assert code_cache.read(NAME) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_used(folder, mode):
    code_cache.write(NAME, CODE)
    (folder / NAME).chmod(mode)
    assert code_cache.read(NAME) is None


def test_no_link_is_followed(folder, tmp_path, monkeypatch):
    code_cache.write(NAME, CODE)
    target = tmp_path / "precious"
    (folder / NAME).rename(target)
    precious = target.read_bytes()
    (folder / NAME).symlink_to(target)
    assert code_cache.read(NAME) is None
    monkeypatch.setattr(code_cache.secrets, "token_hex", lambda count: "guessed")
    (folder / f".{NAME}.guessed").symlink_to(target)
    code_cache.write(NAME, b"new")  # the temporary file exists already, so nothing is written
    assert target.read_bytes() == precious
    (folder / f".{NAME}.guessed").unlink()
    code_cache.write(NAME, b"new")
    assert target.read_bytes() == precious
    assert code_cache.read(NAME) == b"new"


def test_a_pipe_does_not_hang(folder):
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / NAME)
    assert code_cache.read(NAME) is None


def test_a_file_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=function, n=name, **k: (calls.append(n), f(*a, **k))[1])
    code_cache.write(NAME, CODE)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_leaves_no_file(folder, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code_cache.write(NAME, CODE)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "HOME/.cache/swamp_fast"),
        ({"XDG_CACHE_HOME": ""}, "HOME/.cache/swamp_fast"),
        ({"XDG_CACHE_HOME": "relative"}, "HOME/.cache/swamp_fast"),
        ({"XDG_CACHE_HOME": "./here"}, "HOME/.cache/swamp_fast"),
        ({"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/swamp_fast"),
        ({"XDG_CACHE_HOME": "~/mine"}, "HOME/mine/swamp_fast"),
        ({"SWAMP_FAST_CACHE": ""}, "HOME/.cache/swamp_fast"),
        ({"SWAMP_FAST_CACHE": "~/mine"}, "HOME/mine"),
        ({"SWAMP_FAST_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"SWAMP_FAST_CACHE": "~nobody-of-this-name/x"}, None),
    ],
)
def test_where_the_folder_is(variables, expected, tmp_path, monkeypatch):
    for name in ("SWAMP_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    found = code_cache.cache_folder()
    assert found == (None if expected is None else Path(expected.replace("HOME", str(tmp_path))))
    if expected is None:
        code_cache.write(NAME, CODE)
        assert code_cache.read(NAME) is None
