"""TensorBoard files, against bytes that the reference protobuf classes made and against the CRC's published value."""

from __future__ import annotations

import struct

from neo.train.event_file import EventFile, crc32c, record, scalar_event

# Event(wall_time=1700000000.5, step=300, summary=[("train/loss", 2.5), ("é", -0.1)]), by tensorboardX 2.6.5
EVENT = bytes.fromhex("0900002040fc54d94110ac022a1e0a110a0a747261696e2f6c6f737315000020400a090a02c3a915cdccccbd")
RECORD = bytes.fromhex("2c00000000000000f4aecc45") + EVENT + bytes.fromhex("88575735")


def read(data: bytes) -> list[bytes]:
    payloads = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        payload = data[12:12 + length]
        assert data[:12 + length + 4] == record(payload)
        payloads.append(payload)
        data = data[12 + length + 4:]
    return payloads


def test_bytes_are_those_of_the_reference():
    assert crc32c(b"123456789") == 0xE3069283  # the check value every CRC catalogue gives
    assert scalar_event(1700000000.5, 300, {"train/loss": 2.5, "é": -0.1}) == EVENT
    assert record(EVENT) == RECORD


def test_file_holds_header_purge_mark_and_scalars(tmp_path):
    file = EventFile(tmp_path / "tensorboard", purge_step=7)
    file.scalars(7, {"a": 1.0}, wall_time=5.0)
    header, purge, event = read(file.path.read_bytes())  # before close: a killed run keeps what was written
    file.close()
    assert header.endswith(b"\x1a\x0dbrain.Event:2")
    assert purge[9:] == bytes([0x10, 7, 0x3A, 2, 8, 1])
    assert event == scalar_event(5.0, 7, {"a": 1.0})


def test_files_of_one_process_have_their_own_names(tmp_path):
    assert EventFile(tmp_path).path != EventFile(tmp_path).path
