import io
import stat
import tarfile
import zipfile

import pytest

from sdseg_cli.core.data import archives
from sdseg_cli.core.data.archives import is_archive, unpack, unpacked
from sdseg_cli.core.errors import DataError

pytestmark = pytest.mark.faults(14)


def make_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as pack:
        for name, content in files.items():
            pack.writestr(name, content)
    return path


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as pack:
        for name, content in files.items():
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            pack.addfile(member, io.BytesIO(content))
    return path


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_refused(archive, message, **options):
    work = archive.parent / "deep" / "work"
    with pytest.raises(DataError, match=message), unpacked(archive, work, **options):
        pass
    assert everything_in(archive.parent) == [archive.name]
    assert not work.exists()


FILES = {"a/1.txt": b"one", "a/b/2.txt": b"two", "größe.txt": b"three"}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_what_was_packed_comes_out(tmp_path, kind):
    archive = tmp_path / f"pack.{kind}"
    if kind == "zip":
        make_zip(archive, FILES)
    else:
        make_tar(archive, FILES, "w:" + kind.partition(".")[2])
    assert is_archive(archive)
    with unpacked(archive, tmp_path / "work") as folder:
        assert everything_in(folder) == ["a/1.txt", "a/b/2.txt", "größe.txt"]
        assert (folder / "a/b/2.txt").read_bytes() == b"two"
    assert not (tmp_path / "work").exists()


def test_the_temporary_folder_goes_when_the_work_fails(tmp_path):
    archive = make_zip(tmp_path / "pack.zip", FILES)

    def work():
        with unpacked(archive, tmp_path):
            raise RuntimeError("work failed")

    with pytest.raises(RuntimeError, match="work failed"):
        work()
    assert everything_in(tmp_path) == ["pack.zip"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["pack.zip"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "C:/evil.txt", "..\\evil.txt"]
)
def test_paths_that_escape_are_refused_and_nothing_is_left(tmp_path, kind, name):
    files = {"good.txt": b"good", name: b"evil"}
    archive = (make_zip if kind == "zip" else make_tar)(tmp_path / f"pack.{kind}", files)
    assert_refused(archive, r"pack\.\w+: the path '.*evil.txt' leads outside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, "/etc/passwd"
    archive = make_tar(tmp_path / "pack.tar", {"good.txt": b"good", member: b""})
    assert_refused(archive, r"pack\.tar: 'link' is a link or device")


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive = make_zip(tmp_path / "pack.zip", {"good.txt": b"good", link: b"/etc/passwd"})
    assert_refused(archive, r"pack\.zip: 'link' is a link or device")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_is_refused(tmp_path, kind):
    zeros = {"zeros.png": bytes(80 * 2**20)}
    if kind == "zip":
        archive = make_zip(tmp_path / "pack.zip", zeros)
    else:
        archive = make_tar(tmp_path / "pack.tar.gz", zeros, "w:gz")
    assert archive.stat().st_size < 2**20
    assert_refused(archive, r"unpacks to .* MiB or more .*decompression bomb")


def test_a_zip_that_lies_about_its_size_is_not_believed(tmp_path):
    archive = make_zip(tmp_path / "pack.zip", {"zeros.png": bytes(100_000)})
    payload = bytearray(archive.read_bytes())
    at = payload.rindex(b"PK\x01\x02") + 24  # the size in the central directory
    payload[at : at + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(payload)
    assert_refused(archive, r"pack\.zip: the archive is damaged or cut short")


def test_the_size_cap_counts_what_is_written(tmp_path):
    archive = make_tar(tmp_path / "pack.tar", {"a": bytes(1000), "b": bytes(1000)})
    assert_refused(archive, r"at most 1\.5 KiB are accepted", max_bytes=1536)


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    archive = make_zip(tmp_path / "pack.zip", {str(index): b"" for index in range(4)})
    assert_refused(archive, "more than 3 files")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "pack.zip", FILES)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _folder: type("Usage", (), {"free": 5})())
    with pytest.raises(DataError, match=r"needs 11 bytes unpacked, 5 bytes are free"):
        unpack(archive, tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_an_archive_cut_short_leaves_nothing(tmp_path, kind, share):
    noise = {f"{index}.bin": bytes((index * 7 + at * at) % 251 for at in range(9000)) for index in range(3)}
    archive = tmp_path / f"pack.{kind}"
    if kind == "zip":
        make_zip(archive, noise)
    else:
        make_tar(archive, noise, "w:" + kind.partition(".")[2])
    whole = archive.read_bytes()
    length = 30_000 if kind == "tar" else len(whole)  # a plain tar ends with 10 kB of zeros
    archive.write_bytes(whole[: int(length * share)])
    assert_refused(archive, r"pack\.[\w.]+: .*(cut short)")


def test_a_damaged_member_is_noticed(tmp_path):
    archive = tmp_path / "pack.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as pack:
        pack.writestr("a.txt", b"some content")
    archive.write_bytes(archive.read_bytes().replace(b"some", b"same", 1))
    assert_refused(archive, r"damaged or cut short \(Bad CRC-32")


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"<html>sorry</html>", "not a whole zip archive"),
        (b"Rar!\x1a\x07", "not a whole zip archive"),
    ],
)
def test_what_is_no_archive_says_so(tmp_path, payload, expected):
    (tmp_path / "pack.zip").write_bytes(payload)
    with pytest.raises(DataError, match=expected):
        unpack(tmp_path / "pack.zip", tmp_path)


def test_a_rar_says_to_unpack_it_by_hand(tmp_path):
    (tmp_path / "CVC.rar").write_bytes(b"Rar!\x1a\x07\x00")
    with pytest.raises(DataError, match=r"CVC\.rar: RAR and 7z are not read. Unpack it by hand"):
        unpack(tmp_path / "CVC.rar", tmp_path)


def test_an_encrypted_zip_is_refused(tmp_path):
    archive = make_zip(tmp_path / "pack.zip", {"a.txt": b"secret"})
    payload = bytearray(archive.read_bytes())
    payload[payload.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(payload)
    with pytest.raises(DataError, match=r"a\.txt is encrypted"):
        unpack(archive, tmp_path)


def test_a_name_that_comes_twice_is_refused(tmp_path):
    archive = make_tar(tmp_path / "pack.tar", {tarfile.TarInfo("a"): b"1", tarfile.TarInfo("./a"): b"2"})
    assert_refused(archive, r"holds '\./a' twice")


def test_what_macos_adds_is_left_out(tmp_path):
    archive = make_zip(tmp_path / "p.zip", {"a.png": b"1", "__MACOSX/._a.png": b"2", "b/._c.png": b"3"})
    with unpacked(archive, tmp_path / "work") as folder:
        assert everything_in(folder) == ["a.png"]


def test_progress_is_told_in_bytes(tmp_path):
    told = []
    archive = make_zip(tmp_path / "pack.zip", FILES)
    with unpacked(archive, tmp_path, progress=lambda done, total: told.append((done, total))):
        pass
    assert told == [(3, 11), (6, 11), (11, 11)]
