"""Keeps sandboxes out of each other's way on disk."""

from __future__ import annotations

import array
import contextlib
import fcntl
import functools
import os
from pathlib import Path

# linux/fs.h; see chattr(1), attribute T.
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_TOPDIR_FL = 0x00020000


@functools.cache
def spread_out(folder: Path) -> None:
    """Tell the file system that what is in the folders of this one is unrelated.

    Ext4 then puts them into different block groups. In one group, each new file is searched a place
    for among the inodes of all that were removed in the last minutes, which ext4 does not use again
    so soon: a fifth of a no-op fork's time. Other file systems don't know the hint, and nothing
    happens.
    """
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flags = array.array("i", [0])
            fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
            flags[0] |= FS_TOPDIR_FL
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags)
        finally:
            os.close(fd)
