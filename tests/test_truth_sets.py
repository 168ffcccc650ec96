"""Photos with known places on disk: the field's test sets by name, anybody's tables, leaks of training."""

import pytest
from known_places import MadePhotos
from made_sets import jpeg, write_table, write_tar

from geoengine.bench.truth import PartOf, TruthError
from geoengine.bench.truth_sets import KNOWN_SETS, KnownSet, open_truth_set, refuse_trained
from geoengine.engine.errors import PhotoError
from geoengine.engine.photo_sets import PhotoSetError
from geoengine.engine.photos import PhotoLimits
from geoengine.engine.tiles import LngLat

ROWS = [
    ("104123223_7410c654ba_19_19355699@N00.jpg", 48.8583, 2.2945),
    ("110238103_6ea27f1a17_38_30872871@N00.jpg", -33.8568, 151.2153),
    ("199384251_7860f20c04_66_63163416@N00.jpg", 0.0, -180.0),
]
TABLE = "IMG_ID,AUTHOR,LAT,LON,S3_Label\n" + "".join(f"{key},me,{lat},{lng},1\n" for key, lat, lng in ROWS)


def shade(photo):
    return int(photo.read().pixels[5, 5, 2])


@pytest.fixture
def im2gps(tmp_path, monkeypatch):
    """A folder with two of three photos, one with the prefix that the original has, and one without a row."""
    monkeypatch.setitem(KNOWN_SETS, "im2gps", KnownSet("im2gps", "IM2GPS", 4, 3))
    photos = tmp_path / "images"
    photos.mkdir()
    (photos / f"New_York_00024_{ROWS[0][0]}").write_bytes(jpeg(10))
    (photos / ROWS[1][0]).write_bytes(jpeg(20))
    (photos / "253668751_c8cce71b58_102_23601949@N00.jpg").write_bytes(jpeg(30))
    write_table(tmp_path / "im2gps_places365.csv", TABLE)
    return photos


def test_the_field_says_how_large_its_sets_are():
    sizes = {known.name: (known.photos, known.places) for known in KNOWN_SETS.values()}
    assert sizes == {"im2gps": (237, 237), "im2gps3k": (3000, 2997), "yfcc4k": (4536, 4536)}


def test_photos_of_a_named_set_are_found_whatever_is_before_their_names(im2gps):
    truth = open_truth_set("im2gps", photos=im2gps)
    photos = list(truth)
    assert [photo.key for photo in photos] == [row[0] for row in ROWS]
    assert photos[0].place == LngLat(2.2945, 48.8583)
    assert abs(shade(photos[0]) - 10) < 5
    assert abs(shade(photos[1]) - 20) < 5
    with pytest.raises(PhotoError, match=r"199384251_.*: there is no such photo in the folder"):
        photos[2].read()
    assert (truth.name, truth.title, truth.world, truth.wanted) == ("im2gps", "IM2GPS", "earth", 3)
    assert truth.remarks() == [
        "1 of 3 photos are not there and count as misses",
        "1 photos without a known place are left out",
    ]


def test_a_named_set_of_another_size_is_told(im2gps, tmp_path):
    table = write_table(tmp_path / "short.csv", "".join(TABLE.splitlines(keepends=True)[:-1]))
    remarks = open_truth_set("im2gps", photos=im2gps, table=table).remarks()
    assert "there are 2 places in short.csv, and IM2GPS has 3: figures of another number" in remarks[0]


@pytest.mark.parametrize("where", ["beside", "inside", "only"])
def test_the_table_of_a_named_set_is_found(im2gps, tmp_path, where):
    table = tmp_path / "im2gps_places365.csv"
    if where == "inside":
        table = table.rename(im2gps / table.name)
    if where == "only":
        table = table.rename(im2gps / "truth.csv")
    assert open_truth_set("im2gps", photos=im2gps).table == table


def test_named_sets_that_are_not_there(im2gps, tmp_path):
    with pytest.raises(TruthError, match="name the folder of its 4 photos with --photos"):
        open_truth_set("im2gps")
    with pytest.raises(TruthError, match="no such folder"):
        open_truth_set("im2gps", photos=tmp_path / "no")
    (tmp_path / "im2gps_places365.csv").unlink()
    with pytest.raises(TruthError, match=r"expected im2gps_places365.csv there or beside it.*--places"):
        open_truth_set("im2gps", photos=im2gps)
    other = write_table(tmp_path / "other.csv", "IMG_ID,LAT,LON\n99999999_aa_1_b@N00.jpg,1,2\n")
    with pytest.raises(TruthError, match=r"none of the 3 photos there is named as a row of .*other.csv"):
        open_truth_set("im2gps", photos=im2gps, table=other)


def test_a_table_of_ones_own(tmp_path):
    for number in (40, 50):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    table = write_table(
        tmp_path / "mine.csv", "image;latitude;longitude\n40.jpg;1.5;2.5\n50.jpg;-3;4\n60.jpg;5;6\n"
    )
    for truth in (open_truth_set(str(table)), open_truth_set(str(tmp_path))):
        photos = list(truth)
        assert [photo.place for photo in photos] == [LngLat(2.5, 1.5), LngLat(4, -3), LngLat(6, 5)]
        assert abs(shade(photos[1]) - 50) < 5
        with pytest.raises(PhotoError, match=r"60\.jpg"):
            photos[2].read()
        assert (truth.name, truth.world, truth.wanted) == ("mine", "earth", None)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = table.rename(elsewhere / "mine.csv")
    for truth in (open_truth_set(str(moved), photos=tmp_path), open_truth_set(str(tmp_path), table=moved)):
        assert abs(shade(next(iter(truth))) - 40) < 5


def test_tars_with_places(tmp_path):
    samples = {f"{n:09d}": {"jpg": jpeg(n), "json": {"latitude": n, "longitude": -n}} for n in (10, 20)}
    truth = open_truth_set(str(write_tar(tmp_path / "00000.tar", samples)))
    assert [photo.place for photo in truth] == [LngLat(-10, 10), LngLat(-20, 20)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,lat\na.jpg,1\n", "no column for the longitude"),
        ("name,lat,lon\na.jpg,1,2\n", "no column for the photo"),
        (
            "id,lat,lon\na.jpg,1,2\nb.jpg,120.5,33\n",
            "row 3: the latitude 120.5 is not from -90 to 90.*swapped",
        ),
        ("id,lat,lon\na.jpg,,2\n", "row 2: there is no latitude"),
        ("id,lat,lon\na.jpg,1,2\na.jpg,3,4\n", "row 3: a.jpg is there twice"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, sentence):
    table = write_table(tmp_path / "bad.csv", text)
    with pytest.raises((TruthError, PhotoSetError), match=sentence):
        list(open_truth_set(str(table)))


def test_what_is_no_data_set_is_said():
    with pytest.raises(TruthError, match=r"im2gps4k: there is no such file or folder, and .* planet, im2gps"):
        open_truth_set("im2gps4k")
    with pytest.raises(TruthError, match="the planet's photos are drawn"):
        open_truth_set("planet", photos="folder")


def test_large_photos_are_refused_when_they_are_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    table = write_table(tmp_path / "t.csv", "id,lat,lon\na.jpg,1,2\n")
    [photo] = open_truth_set(str(table), limits=PhotoLimits(max_pixels=100))
    with pytest.raises(PhotoError, match="more than the limit of 100"):
        photo.read()


def test_a_part_of_a_set_is_the_same_each_time_and_grows():
    whole = MadePhotos([LngLat(n, 0) for n in range(50)])
    few, more = PartOf(whole, 10, 1), PartOf(whole, 20, 1)
    keys = [photo.key for photo in few]
    assert keys == [photo.key for photo in few] and len(keys) == 10
    assert set(keys) < {photo.key for photo in more}
    assert keys != [photo.key for photo in PartOf(whole, 10, 2)]
    assert keys != [f"photo {n}" for n in range(10)]
    assert few.identity == whole.identity
    assert few.remarks()[0].startswith("10 photos at most, chosen at random with seed 1")
    assert len(list(PartOf(whole, 99, 1))) == 50
    with pytest.raises(TruthError, match="at least one photo, got 0"):
        PartOf(whole, 0, 1)


# --- leaks ------------------------------------------------------------------------------------------------


def test_a_test_photo_that_was_trained_on_is_refused(im2gps, tmp_path):
    truth = open_truth_set("im2gps", photos=im2gps)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    header = "id,latitude,longitude,author,phash\n"
    clean = header + "34/8d/9055806529.jpg,1,2,x,00\n"
    write_table(prepared / "train.csv", clean)
    refuse_trained(truth, prepared)
    write_table(prepared / "valid.csv", header + "ab/cd/110238103.jpg,1,2,x,00\n")
    with pytest.raises(
        TruthError,
        match=r"1 photos of IM2GPS are in .*prepared, the first 110238103_.*, in valid.csv as ab/cd",
    ):
        refuse_trained(truth, prepared)
    write_table(tmp_path / "list.csv", clean + f"{ROWS[0][0]},1,2,x,00\n")
    with pytest.raises(TruthError, match="the first 104123223_"):
        refuse_trained(truth, tmp_path / "list.csv")


def test_a_training_set_that_cannot_be_looked_into(im2gps, tmp_path):
    with pytest.raises(TruthError, match=r"expected a folder made by `geoengine prepare`, with train.csv"):
        refuse_trained(open_truth_set("im2gps", photos=im2gps), tmp_path)
