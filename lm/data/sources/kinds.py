"""What a file is by its first bytes: packed, text, or something that no source of text can read."""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

HEAD_BYTES = 1 << 16  # that are looked at
TEXT_BYTES = 4096  # of them, to say that they are text
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma", ".zst": "zstd"}
BOM = codecs.BOM_UTF8
# UTF-32 first: its mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CONTROLS = bytes([*range(7), *range(14, 27), *range(28, 32), 127])  # a text may hold escapes and form feeds


class Kind(NamedTuple):
    """What a file is, as in "got a PDF document", and the way out."""

    name: str
    way_out: str

    def within(self, packings: tuple[str, ...]) -> Kind:
        """The same inside of files that are packed."""
        return self._replace(name=self.name + "".join(f" inside {p}" for p in reversed(packings)))


UNPACK = "unpack it and name the files that were in it"
LEAVE = "leave it out of the glob"
EXPORT = "write its text to JSON lines or Parquet"
CONVERT = "convert it to text first"
PARQUET = Kind("a Parquet file", "use the Parquet source")
ARROW = Kind("an Arrow file", "use the Arrow source")
ARROW_STREAM = Kind("an Arrow stream", "use the Arrow source")
TFRECORD = Kind("a TFRecord file", "use the Tfds source, or write its text to JSON lines")
TAR = Kind("a tar archive", UNPACK)

# At an offset, these bytes. Whatever of them a text could begin with is only looked for where the file is no text.
MAGIC: tuple[tuple[int, bytes, Kind], ...] = tuple(
    (at, magic, Kind(name, way_out))
    for at, magic, name, way_out in (
        (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
        (0, b"PK\x03\x04", "a zip archive (docx, xlsx, epub and npz are some too)", UNPACK),
        (0, b"PK\x05\x06", "an empty zip archive", LEAVE),
        (0, b"PK\x07\x08", "a part of a zip archive", UNPACK),
        (0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
        (257, b"ustar", *TAR),
        (0, b"!<arch>\n", "an ar archive", UNPACK),
        (0, b"\xed\xab\xee\xdb", "an rpm package", UNPACK),
        (0, b"MSCF\0\0\0\0", "a cab archive", UNPACK),
        (0, b"xar!", "a xar archive", UNPACK),
        (0, b"070701", "a cpio archive", UNPACK),
        (0, b"070702", "a cpio archive", UNPACK),
        (0, b"\x04\x22\x4d\x18", "a file packed by lz4", "unpack it (lz4 -d)"),
        (0, b"LZIP", "a file packed by lzip", "unpack it (lzip -d)"),
        (0, b"\x1f\x9d", "a file packed by compress", "unpack it (gzip -d)"),
        (0, b"\x1f\xa0", "a file packed by compress", "unpack it (gzip -d)"),
        (0, b"\x89LZO\0\r\n\x1a\n", "a file packed by lzop", "unpack it (lzop -d)"),
        (0, b"\xff\x06\0\0sNaPpY", "a file packed by snappy", "unpack it"),
        (0, b"PAR1", *PARQUET),
        (0, b"PARE", *PARQUET),
        (0, b"ARROW1", *ARROW),
        (0, b"FEA1", "a Feather file of version 1", "write it again as Arrow or Parquet"),
        (0, b"ORC", "an ORC file", "write it again as Parquet"),
        (0, b"Obj\x01", "an Avro file", "write it again as Parquet or JSON lines"),
        (0, b"SQLite format 3\0", "an SQLite database", EXPORT),
        (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
        (0, b"CDF\x01", "a NetCDF file", EXPORT),
        (0, b"CDF\x02", "a NetCDF file", EXPORT),
        (0, b"\x93NUMPY", "a NumPy array", EXPORT),
        (0, b"MMIDIDX\0\0", "an index of Megatron's token files", "name the text that they were made from"),
        (0, b"GGUF", "a GGUF model", LEAVE),
        (0, b"\x80\x02", "a pickle", EXPORT),
        (0, b"\x80\x03", "a pickle", EXPORT),
        (0, b"\x80\x04", "a pickle", EXPORT),
        (0, b"\x80\x05", "a pickle", EXPORT),
        (0, b"\x89PNG\r\n\x1a\n", "a PNG image", LEAVE),
        (0, b"\xff\xd8\xff", "a JPEG image", LEAVE),
        (0, b"GIF87a", "a GIF image", LEAVE),
        (0, b"GIF89a", "a GIF image", LEAVE),
        (0, b"BM", "a BMP image", LEAVE),
        (0, b"II*\0", "a TIFF image", LEAVE),
        (0, b"MM\0*", "a TIFF image", LEAVE),
        (0, b"8BPS", "a Photoshop image", LEAVE),
        (0, b"\0\0\x01\0", "an icon", LEAVE),
        (8, b"WEBP", "a WebP image", LEAVE),
        (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image", LEAVE),
        (0, b"\0\0\0\x0cJXL ", "a JPEG XL image", LEAVE),
        (8, b"WAVE", "a WAV sound", LEAVE),
        (8, b"AVI ", "an AVI video", LEAVE),
        (4, b"ftyp", "an MP4 video or HEIF image", LEAVE),
        (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", LEAVE),
        (0, b"OggS", "an Ogg sound", LEAVE),
        (0, b"fLaC", "a FLAC sound", LEAVE),
        (0, b"ID3", "an MP3 sound", LEAVE),
        (0, b"\xff\xfb", "an MP3 sound", LEAVE),
        (0, b"MThd\0\0\0\x06", "a MIDI file", LEAVE),
        (0, b"AT&TFORM", "a DjVu document", CONVERT),
        (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of old Microsoft Office", CONVERT),
        (60, b"BOOKMOBI", "a Mobipocket book", CONVERT),
        (0, b"\x7fELF", "an ELF program", LEAVE),
        (0, b"MZ", "a Windows program", LEAVE),
        (0, b"\xcf\xfa\xed\xfe", "a macOS program", LEAVE),
        (0, b"\xca\xfe\xba\xbe", "a Java class or macOS program", LEAVE),
        (0, b"\0asm", "a WebAssembly program", LEAVE),
        (0, b"wOFF", "a font", LEAVE),
        (0, b"wOF2", "a font", LEAVE),
        (0, b"\0\x01\0\0\0", "a font", LEAVE),
        (0, b"OTTO\0", "a font", LEAVE),
    )
)
# Of characters, but no text to learn from.
SPELT: tuple[tuple[re.Pattern[bytes], Kind], ...] = (
    (re.compile(rb"%PDF-\d"), Kind("a PDF document", CONVERT)),
    (re.compile(rb"\{\\rtf1"), Kind("an RTF document", CONVERT)),
    (
        re.compile(rb"version https://git-lfs\.github\.com/spec/v1\r?\noid sha256:"),
        Kind("a pointer of Git LFS, not the file", "run `git lfs pull`"),
    ),
)


def packing(head: bytes) -> str | None:
    """How a file is packed that begins so, where it can be unpacked here: a value of SUFFIXES."""
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if head[:3] == b"BZh" and head[3:4].isdigit() and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"  # a block follows, or the end
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    if head[:3] == b"]\0\0" and len(head) >= 13 and (head[5:13] == b"\xff" * 8 or head[10:13] == b"\0\0\0"):
        return "lzma"  # with the size not said, or below 1 TB
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    return None


def is_text(head: bytes) -> bool:
    """Whether the first bytes are UTF-8 without control characters that no text has."""
    start = head[:TEXT_BYTES]
    try:
        codecs.utf_8_decode(start, "strict", False)  # what is cut at the end is no error
    except UnicodeDecodeError:
        return False
    return not _has_controls(start)


def _has_controls(raw: bytes) -> bool:
    return len(raw.translate(None, CONTROLS)) < len(raw)


def encoding(head: bytes) -> tuple[str, int] | None:
    """(name, bytes of the mark) of an encoding other than UTF-8 that the first bytes declare by their mark."""
    if head[:1] not in (b"\xff", b"\xfe", b"\0"):
        return None
    return next(((name, len(mark)) for mark, name in MARKS if head.startswith(mark)), None)


def not_text(head: bytes) -> Kind | None:
    """What a file is that begins so, where that is no text; None where nothing says so."""
    for pattern, kind in SPELT:
        if pattern.match(head):
            return kind
    if is_text(head):
        return None
    for at, magic, kind in MAGIC:
        if head.startswith(magic, at) and _is_sure(head, magic):
            return kind
    if _is_tar(head):
        return TAR
    if head[:4] == b"\xff\xff\xff\xff" and len(head) > 8 and head[6:8] == b"\0\0":
        return ARROW_STREAM
    if _is_tfrecord(head):
        return TFRECORD
    return _wide(head)


def _is_sure(head: bytes, magic: bytes) -> bool:
    """Whether more than two or three letters speak for it, which text in another encoding may begin with too."""
    if magic == b"BM":
        return head[14:18] in (bytes([n, 0, 0, 0]) for n in (12, 40, 52, 56, 64, 108, 124))
    if magic[:4] == b"0707":
        return bool(re.match(rb"[0-9A-Fa-f]{110}", head))
    if magic == b"MZ":
        return b"\0\0" in head[:64]
    if magic in (b"ID3", b"ORC", b"LZIP", b"PAR1", b"PARE", b"GGUF", b"FEA1", b"xar!", b"8BPS", b"OggS", b"fLaC"):
        return _has_controls(head[len(magic) : len(magic) + 8])
    if magic == b"\xff\xfb":
        return len(head) > 2 and head[2] >> 4 not in (0, 15)  # the rate
    if magic[:1] == b"\x80":
        return head[2:3] in (b"\x95", b"}", b"]", b"(", b"c", b"X", b"\x8c", b"q")
    if magic in (b"WEBP", b"WAVE", b"AVI "):
        return head[:4] == b"RIFF"
    return True


def _is_tar(head: bytes) -> bool:
    """Whether it begins with the header of a tar file, whose sum is right: old ones have no magic."""
    try:
        said = int(head[148:156].strip(b" \0") or b"-", 8)
    except ValueError:
        return False
    return len(head) >= 512 and said == sum(head[:148]) + 8 * 32 + sum(head[156:512])


def _is_tfrecord(head: bytes) -> bool:
    """Whether it begins with a length and its masked CRC32C."""
    if len(head) < 12:
        return False
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(head[8:12], "little")


def _wide(head: bytes) -> Kind | None:
    """UTF-16 or UTF-32 without a mark, known by the NULs of its Latin letters, spaces and line ends."""
    start = head[: TEXT_BYTES - TEXT_BYTES % 4]
    places = [len(start[i::4]) for i in range(4)]
    zero = [start[i::4].count(0) / (n or 1) for i, n in enumerate(places)]
    names = {
        "UTF-32LE": zero[3] > 0.9 and zero[2] > 0.9 and zero[0] < 0.1,
        "UTF-32BE": zero[0] > 0.9 and zero[1] > 0.9 and zero[3] < 0.1,
        "UTF-16LE": min(zero[1], zero[3]) > 0.1 and max(zero[0], zero[2]) < 0.02,
        "UTF-16BE": min(zero[0], zero[2]) > 0.1 and max(zero[1], zero[3]) < 0.02,
    }
    for name, is_it in names.items():
        if is_it and len(start) >= 4:
            return Kind(f"{name} without a byte order mark", f"convert it (iconv -f {name} -t UTF-8)")
    return None
