"""What is said about a folder of photos; nothing is left out in silence."""

from pathlib import Path

import pytest
from data.pictures import DREAMBENCH, on_the_dataset
from made_photos import photo, take
from PIL import Image, ImageFilter

from customized_grpo.errors import ConfigError, DataError
from customized_grpo.tools.init.photos import Album, read_album

ORIENTATION = 0x0112


def found(album: Album) -> set[tuple[str, str]]:
    return {(remark.photo, remark.kind) for remark in album.remarks}


def test_good_photos_get_no_remark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "customized_grpo"):
        album = read_album(take(tmp_path / "photos", 6), 512)
    assert caplog.messages == ["reading 6 photos"]
    assert [photo.path.name for photo in album.photos] == [f"{c}.jpg" for c in "abcdef"]
    assert album.remarks == ()


@pytest.mark.usefixtures("without_heic")
def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = take(tmp_path / "photos", 5)
    good = photo(7, (640, 640))
    good.filter(ImageFilter.GaussianBlur(8)).save(folder / "blurred.png")
    photo(9, (300, 300)).save(folder / "small.png")
    with Image.open(folder / "a.jpg") as first:
        first.resize((600, 600)).save(folder / "z-again.jpg", quality=50)
    see_through = photo(11, (640, 640)).convert("RGBA")
    see_through.paste((0, 0, 0, 0), (0, 0, 640, 60))
    see_through.save(folder / "transparent.png")
    (folder / "broken.jpg").write_bytes((folder / "b.jpg").read_bytes()[:3000])
    Image.new("RGB", (20, 20)).save(folder / "tiny.png")
    (folder / "phone.heic").write_bytes(b"any")
    (folder / "a.mask.png").write_bytes(b"any")
    (folder / "more").mkdir()
    (folder / ".hidden").write_bytes(b"any")
    album = read_album(folder, 512)
    assert found(album) == {
        ("blurred.png", "blurred"),
        ("small.png", "small"),
        ("z-again.jpg", "duplicate"),
        ("transparent.png", "transparent"),
        ("broken.jpg", "unreadable"),
        ("tiny.png", "unreadable"),
        ("phone.heic", "unused"),
        ("a.mask.png", "unused"),
        ("more", "unused"),
    }
    texts = {remark.photo: remark.text for remark in album.remarks}
    assert "as a.jpg" in texts["z-again.jpg"]
    assert "at least 32 px" in texts["tiny.png"]
    assert str(tmp_path) not in " ".join(texts.values())


def test_names_reach_a_terminal_as_text(tmp_path: Path) -> None:
    folder = take(tmp_path / "photos", 5)
    (folder / "\x1b[2Jred\u202e.jpg").write_bytes(b"no picture")
    (folder / "a\nb.jpg").write_bytes((folder / "a.jpg").read_bytes())
    album = read_album(folder, 512)
    assert all(str(remark).isprintable() for remark in album.remarks)
    assert found(album) == {
        (r"\x1b[2Jred\u202e.jpg", "unreadable"),
        ("a.jpg", "duplicate"),
    }


def test_sizes_are_upright(tmp_path: Path) -> None:
    folder = take(tmp_path / "photos", 5, (640, 480))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo(20, (640, 480)).save(folder / "turned.jpg", exif=exif)
    turned = read_album(folder, 128).photos[-1]
    assert (turned.width, turned.height) == (480, 640)


def test_shapes_that_differ_are_named_but_for_squares(tmp_path: Path) -> None:
    folder = take(tmp_path / "photos", 5, (640, 480))
    photo(20, (480, 960)).save(folder / "tall.jpg")
    photo(21, (1500, 500)).save(folder / "panorama.jpg")
    kinds = found(read_album(folder, 128))
    assert ("", "shape") in kinds
    assert ("panorama.jpg", "shape") in kinds
    assert ("tall.jpg", "shape") not in kinds
    assert "shape" not in {kind for _, kind in found(read_album(folder, 128, squares=True))}


@pytest.mark.parametrize(("count", "says"), [(1, "1 photo:"), (4, "4 photos:"), (41, "41 photos:")])
def test_too_few_or_many(tmp_path: Path, count: int, says: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        photo(number, (64, 64)).save(folder / f"{number}.png")
    (remark,) = [r for r in read_album(folder, 32).remarks if r.kind == "count"]
    assert remark.text.startswith(says)


def test_what_cannot_be_used_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--photos must be a folder"):
        read_album(tmp_path / "nowhere", 512)
    with pytest.raises(DataError, match="got none; put 5 to 20"):
        read_album(tmp_path, 512)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"got none; a\.jpg: left out, as it is not a readable"):
        read_album(tmp_path, 512)
    for number in range(201):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(DataError, match="at most 200"):
        read_album(tmp_path, 512)


@on_the_dataset
def test_few_photos_of_dreambench_are_remarked_on() -> None:
    folders = sorted(p for p in DREAMBENCH.iterdir() if p.is_dir())
    albums = [read_album(folder, 512) for folder in folders[::5]]
    photos = sum(len(album.photos) for album in albums)
    odd = [r for album in albums for r in album.remarks if r.kind in ("blurred", "duplicate")]
    assert photos > 20
    assert len(odd) <= 0.15 * photos
