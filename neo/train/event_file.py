"""Scalars for TensorBoard, written without TensorFlow, torch or protobuf.

A file is a sequence of TFRecords (uint64 length, masked CRC-32C of it, payload, masked CRC-32C of the payload:
tensorflow/core/lib/io/record_writer.h), each payload an `Event` message (tensorflow/core/util/event.proto), of which
scalars need five fields. Packages that write these files import torch wherever it is installed; training must not.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping

from etils import epath

_COUNT = itertools.count()  # two files made by one process in one second need two names
FLUSH_SECONDS = 30.0  # ours: object stores cannot append, so there the whole file is written anew this often


class EventFile:
    """One event file in a folder, local or on an object store.

    With `purge_step`, TensorBoard forgets what earlier files of the folder hold from that step on: a run that
    resumed computes those steps again.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None):
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
        self.path = folder / name
        self._local = open(self.path, "wb") if "://" not in str(folder) else None  # noqa: SIM115 (closed by close)
        self._waiting = bytearray()
        self._flushed = 0.0
        self._write(_double(1, now) + _bytes(3, b"brain.Event:2"))
        if purge_step is not None:
            session_start = _integer(1, 1)
            self._write(_double(1, now) + _integer(2, purge_step) + _bytes(7, session_start))

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float | None = None) -> None:
        """Add the values of one step; `wall_time` in seconds since 1970, now if None."""
        self._write(scalar_event(time.time() if wall_time is None else wall_time, step, values))

    def close(self) -> None:
        """Write what is waiting. The object cannot be used afterwards."""
        if self._local is not None:
            self._local.close()
        else:
            self.path.write_bytes(bytes(self._waiting))

    def _write(self, payload: bytes) -> None:
        framed = record(payload)
        if self._local is not None:
            self._local.write(framed)
            self._local.flush()
            return
        self._waiting += framed
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.path.write_bytes(bytes(self._waiting))
            self._flushed = time.monotonic()


def scalar_event(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """The `Event` message with one `Summary.Value` (tag, simple_value) for each value."""
    summary = b"".join(_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items())
    return _double(1, wall_time) + _integer(2, step) + _bytes(5, summary)


def record(payload: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(payload))
    return length + _masked_crc(length) + payload + _masked_crc(payload)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table() -> tuple[int, ...]:
    entries = []
    for entry in range(256):
        for _ in range(8):
            entry = (entry >> 1) ^ (0x82F63B78 if entry & 1 else 0)  # the polynomial, bits reversed
        entries.append(entry)
    return tuple(entries)


_TABLE = _table()


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


# The four protobuf encodings needed: a tag is (field number << 3 | wire type).
def _varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _double(field: int, number: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", number)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _float(field: int, number: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", number)
