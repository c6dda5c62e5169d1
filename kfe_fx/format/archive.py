"""Read a zip that may be hostile: where each record lies is checked before anything is read, bytes by their CRC.

Only what torch.save writes is taken: records stored without compression, one after the other, nothing before the
first. So the bytes to be read are never more than the file has.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from kfe_fx.format.fields import Malformed

MAGIC = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_MOST_RECORDS = 1_000_000
_LARGEST_DIRECTORY = 2**28
_CHUNK = 2**20
_SEAL = b"kfe-fx seal "


@dataclass(frozen=True)
class Member:
    """One record: its bytes are ``file[start : start + size]``."""

    start: int
    size: int
    crc: int


class Archive:
    """The records of a zip by name, without the top folder that torch puts around them.

    Raises:
        Malformed: damaged, or not as torch.save writes it.
    """

    def __init__(self, handle: BinaryIO) -> None:
        """Read and check the directory of the zip; ``handle`` stays the caller's."""
        self.handle = handle
        self.length = handle.seek(0, 2)
        self.end, count = _check_end(handle, self.length)
        try:
            with zipfile.ZipFile(handle) as opened:
                infos = opened.infolist()
                self.comment = opened.comment
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError) as error:
            raise Malformed(f"a damaged zip: {error}"[:200]) from None
        if len(infos) != count:
            raise Malformed("the directory of the zip does not fit the file")
        self.root, self.members = self._members(infos)

    def _members(self, infos: list[zipfile.ZipInfo]) -> tuple[str, dict[str, Member]]:
        root = infos[0].filename.split("/")[0] if infos else ""
        members: dict[str, Member] = {}
        reached = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            name = info.filename.removeprefix(f"{root}/")
            parts = name.split("/")
            if name == info.filename or "\\" in name or not all(parts) or ".." in parts or "." in parts:
                raise Malformed(f"the record {info.filename[:80]!r} has no place there")
            if name in members:
                raise Malformed(f"the record {name[:80]!r} stands twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise Malformed(f"the record {name[:80]!r} is compressed or encrypted; torch.save writes neither")
            start = self._data_start(info, reached)
            reached = start + info.file_size
            if reached > self.end:
                raise Malformed(f"the record {name[:80]!r} reaches beyond the file")
            members[name] = Member(start, info.file_size, info.CRC)
        return root, members

    def _data_start(self, info: zipfile.ZipInfo, reached: int) -> int:
        self.handle.seek(info.header_offset)
        header = self.handle.read(_LOCAL.size)
        if info.header_offset < reached or len(header) != _LOCAL.size or header[:4] != MAGIC:
            raise Malformed("records overlap or are cut off")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        return info.header_offset + _LOCAL.size + name_length + extra_length

    def size(self, name: str) -> int:
        """Return the bytes of a record.

        Raises:
            Malformed: there is no such record.
        """
        return self._member(name).size

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise Malformed(f"the record {name[:80]!r} is missing")
        return self.members[name]

    def read(self, name: str, limit: int) -> bytes:
        """Return a small record.

        Raises:
            Malformed: missing, damaged, or larger than ``limit`` bytes.
        """
        if self.size(name) > limit:
            raise Malformed(f"the record {name[:80]!r} has {self.size(name)} bytes; at most {limit} make sense")
        data = bytearray(self.size(name))
        self.read_into(name, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer``, exactly as long as the record, and check the CRC.

        Raises:
            Malformed: missing or damaged.
        """
        member = self._member(name)
        self.handle.seek(member.start)
        done = 0
        while done < member.size:
            count = self.handle.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not count:
                break
            done += count
        if done != member.size or zlib.crc32(buffer) != member.crc:
            raise Malformed(f"the record {name[:80]!r} is damaged")

    def check(self, name: str) -> None:
        """Read a record only to check its CRC.

        Raises:
            Malformed: it is damaged.
        """
        member = self._member(name)
        if _crc_of(self.handle, member.start, member.start + member.size) != member.crc:
            raise Malformed(f"the record {name[:80]!r} is damaged")

    def check_seal(self) -> None:
        """Check what no record's CRC covers (headers, padding, directory) against the zip's comment.

        Raises:
            Malformed: damaged, or changed by another program.
        """
        if self.comment != _SEAL + b"%08x" % self.frame_crc():
            raise Malformed("the zip is damaged or was packed again by another program")

    def frame_crc(self) -> int:
        """Return the CRC of all bytes outside the records' data and the seal's own digits."""
        crc = position = 0
        for member in sorted(self.members.values(), key=lambda member: member.start):
            crc = _crc_of(self.handle, position, member.start, crc)
            position = member.start + member.size
        return _crc_of(self.handle, position, self.length - 8, crc)


def _crc_of(handle: BinaryIO, start: int, stop: int, crc: int = 0) -> int:
    handle.seek(start)
    while start < stop:
        data = handle.read(min(_CHUNK, stop - start))
        if not data:
            return -1
        crc = zlib.crc32(data, crc)
        start += len(data)
    return crc


def seal(handle: BinaryIO) -> None:
    """Put the checksum of everything outside the records into the comment of a finished zip."""
    with zipfile.ZipFile(handle, "a") as opened:
        opened.comment = _SEAL + b"0" * 8
    handle.flush()
    crc = Archive(handle).frame_crc()
    handle.seek(-8, 2)
    handle.write(b"%08x" % crc)
    handle.flush()


def _check_end(handle: BinaryIO, length: int) -> tuple[int, int]:
    """Return where the directory starts and how many records it names, before zipfile reads all of it into memory."""
    tail_start = max(0, length - _END.size - 0xFFFF)
    handle.seek(tail_start)
    tail = handle.read(length - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise Malformed("the end of the zip is missing: the file is truncated")
    *_, count, size, start, comment = _END.unpack(tail[at : at + _END.size])
    stop = tail_start + at
    if stop + _END.size + comment != length:
        raise Malformed("there is something behind the end of the zip")
    if count == 0xFFFF or size == 0xFFFFFFFF or start == 0xFFFFFFFF or _has_locator(handle, stop):
        stop, count, size, start = _check_end64(handle, stop)
    if start + size != stop or size > _LARGEST_DIRECTORY or count > _MOST_RECORDS or count * 46 > size:
        raise Malformed("the directory of the zip does not fit the file")
    return start, count


def _has_locator(handle: BinaryIO, stop: int) -> bool:
    if stop < _LOCATOR.size:
        return False
    handle.seek(stop - _LOCATOR.size)
    return handle.read(4) == b"PK\x06\x07"


def _check_end64(handle: BinaryIO, stop: int) -> tuple[int, int, int, int]:
    if stop < _LOCATOR.size + _END64.size:
        raise Malformed("the end of the zip is damaged")
    handle.seek(stop - _LOCATOR.size)
    magic, _, at, _ = _LOCATOR.unpack(handle.read(_LOCATOR.size))
    if magic != b"PK\x06\x07" or at != stop - _LOCATOR.size - _END64.size:
        raise Malformed("the end of the zip is damaged")
    handle.seek(at)
    magic, *_, count, size, start = _END64.unpack(handle.read(_END64.size))
    if magic != b"PK\x06\x06":
        raise Malformed("the end of the zip is damaged")
    return at, count, size, start
