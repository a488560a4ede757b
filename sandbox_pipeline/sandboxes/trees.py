"""Measures and removes what a sandbox wrote; standard library only, since the supervisor uses it.

Folders are walked by descriptor: no link is followed, however fast it is planted, and no path is
too long.
"""

# ruff: noqa: PTH101, PTH106, PTH108 (pathlib knows no directory descriptors)
from __future__ import annotations

import contextlib
import os
import stat

DEEPEST = 256


class TooDeepError(Exception):
    """Folders are nested deeper than anything sane, so that their size can't be told."""


def tree_bytes(path: str) -> int:
    """Disk space that a tree takes: hard links once, links never followed.

    Raises:
        TooDeepError: it is nested deeper than `DEEPEST`.
    """
    total = 0
    seen: set[int] = set()
    stack: list[tuple[int, list[str]]] = []
    try:
        total += _enter(stack, path, seen)
        while stack:
            fd, folders = stack[-1]
            if not folders:
                stack.pop()
                os.close(fd)
                continue
            if len(stack) > DEEPEST:
                raise TooDeepError
            with contextlib.suppress(OSError):
                total += _enter(stack, folders.pop(), seen)
    finally:
        for fd, _ in stack:
            os.close(fd)
    return total


def _enter(stack: list[tuple[int, list[str]]], name: str, seen: set[int]) -> int:
    fd = _open_folder(name, stack[-1][0] if stack else None)
    total = 0
    folders: list[str] = []
    stack.append((fd, folders))
    with os.scandir(fd) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    folders.append(entry.name)
                elif found.st_nlink > 1:
                    if found.st_ino in seen:
                        continue
                    seen.add(found.st_ino)
                total += found.st_blocks * 512
    return total


def _open_folder(name: str, parent: int | None) -> int:
    flags = os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, flags | os.O_RDONLY, dir_fd=parent)
    except PermissionError:
        # What is in a folder that forbids itself to be read takes space all the same.
        fd = os.open(name, flags | getattr(os, "O_PATH", os.O_RDONLY), dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
        finally:
            os.close(fd)
        return os.open(name, flags | os.O_RDONLY, dir_fd=parent)


def remove_tree(path: str) -> None:
    """Remove what a sandbox left, whatever its depth and modes; nothing in it may run any more.

    Folders are first moved up, beside each other, so that no path grows long.
    """
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        top = _open_folder(path, None)
    except FileNotFoundError:
        return
    try:
        prefix = f".removing-{os.urandom(8).hex()}"
        folders = _clear(top, top, prefix, 0)
        number = len(folders)
        while folders:
            name = folders.pop()
            with contextlib.suppress(OSError):
                fd = _open_folder(name, top)
                try:
                    found = _clear(fd, top, prefix, number)
                finally:
                    os.close(fd)
                number += len(found)
                folders += found
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)


def _clear(fd: int, top: int, prefix: str, number: int) -> list[str]:
    """Unlink a folder's files and move its folders to the top; their new names."""
    moved: list[str] = []
    with os.scandir(fd) as entries:
        listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in listed:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
        elif fd == top:
            moved.append(name)
        else:
            # A folder that may not be written can't be moved either.
            os.chmod(name, 0o700, dir_fd=fd)
            moved.append(f"{prefix}-{number + len(moved)}")
            os.rename(name, moved[-1], src_dir_fd=fd, dst_dir_fd=top)
    return moved
