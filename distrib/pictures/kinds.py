"""Recognises files that are no pictures by their first bytes, and says what to do."""

from __future__ import annotations

KINDS = (
    (0, b"%PDF", "a PDF document: export the page as PNG"),
    (4, b"ftyphei", "a HEIC picture: export it as JPEG or PNG"),
    (4, b"ftyphev", "a HEIC picture: export it as JPEG or PNG"),
    (4, b"ftypmif1", "a HEIF picture: export it as JPEG or PNG"),
    (4, b"ftypmsf1", "a HEIF picture: export it as JPEG or PNG"),
    (4, b"ftypavif", "an AVIF picture that this Pillow cannot read: export it as PNG"),
    (4, b"ftyp", "a video: save one frame as PNG"),
    (0, b"\x1a\x45\xdf\xa3", "a video: save one frame as PNG"),
    (8, b"AVI ", "a video: save one frame as PNG"),
    (0, b"\x00\x00\x01\xba", "a video: save one frame as PNG"),
    (0, b"\x00\x00\x01\xb3", "a video: save one frame as PNG"),
    (0, b"FLV\x01", "a video: save one frame as PNG"),
    (0, b"PK\x03\x04", "a zip archive or an office document: unpack or export the picture"),
    (0, b"PK\x05\x06", "an empty zip archive: give the picture itself"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (0, b"Rar!", "a RAR archive: unpack it first"),
    (0, b"\x89PNG", "a damaged PNG picture: copy it again"),
    (0, b"\xff\xd8\xff", "a damaged JPEG picture: copy it again"),
    (0, b"GIF8", "a damaged GIF picture: copy it again"),
    (8, b"WEBP", "a damaged WebP picture: copy it again"),
    (0, b"\x1f\x8b", "a gzip file: unpack it first"),
    (0, b"BZh", "a bzip2 file: unpack it first"),
    (0, b"\xfd7zXZ", "an xz file: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
    (0, b"\xd0\xcf\x11\xe0", "an office document: export the picture as PNG"),
    (0, b"%!PS", "a PostScript document: export the page as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS document: export it as PNG"),
    (0, b"8BPS", "a Photoshop document: export it as PNG"),
    (0, b"gimp xcf", "a GIMP document: export it as PNG"),
    (0, b"\xff\x0a", "a JPEG XL picture: export it as PNG"),
    (4, b"JXL ", "a JPEG XL picture: export it as PNG"),
    (0, b"\x93NUMPY", "a NumPy array: save it as PNG"),
    (0, b"\x89HDF", "an HDF5 file: save the images as PNG"),
    (0, b"SQLite format 3", "a database: give pictures"),
    (0, b"\x7fELF", "a program: give pictures"),
    (0, b"MZ", "a program: give pictures"),
    (8, b"WAVE", "a sound: give pictures"),
    (0, b"ID3", "a sound: give pictures"),
    (0, b"OggS", "a sound or a video: save one frame as PNG"),
    (0, b"fLaC", "a sound: give pictures"),
)
"""(offset, bytes at it, the kind of file with the remedy)."""


def kind_of(head: bytes, remedy: str = "give PNG or other pictures, or IDX files") -> str:
    """Describe a file that is no picture, by its first bytes, with the remedy; `remedy` if it is unknown."""
    if not head:
        return "an empty file: copy it again"
    for offset, magic, what in KINDS:
        if head[offset : offset + len(magic)] == magic:
            return what
    try:
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or error.encoding != "utf-8":
            return f"of an unknown kind: {remedy}"
        text = head[: error.start].decode("utf-8-sig")
    start = text.lstrip()[:500].lower()
    if "<svg" in start:
        return "an SVG drawing: export it as PNG"
    if start.startswith(("<!doctype html", "<html")) or "<html" in start:
        return "an HTML page, perhaps an error page saved as a picture: download it again"
    if start.startswith("version https://git-lfs"):
        return "a pointer of Git LFS: run git lfs pull"
    if "\0" in text:
        return f"of an unknown kind: {remedy}"
    return f"a text file: {remedy}"
