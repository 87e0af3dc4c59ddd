"""Images where people have them, against folders and tables made by hand."""

import gzip
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import BenchmarkError
from benchmarks.datasets.class_labels import wnids
from benchmarks.datasets.description import Request
from benchmarks.datasets.imagenet import load_imagenet, output_count
from tests.benchmarks.conftest import SMALL

REAL = "n01440764", "n01443537", "n02056570"  # outputs 0, 1 and 145 of every network for ImageNet


def save(path: Path, color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (36, 36), (color, 255 - color, 100)).save(path)


def flat(folder: Path, number: int) -> list[str]:
    """Images `0.png`, `1.png`... of different colours."""
    for index in range(number):
        save(folder / f"{index}.png", 10 * index)
    return [f"{index}.png" for index in range(number)]


def load(tmp_path, outputs=None, **options):
    asked = Request(cache=tmp_path / "cache", transform=SMALL, outputs=outputs and (lambda image: outputs), **options)
    return load_imagenet(asked)


def labels_by_name(images, labels) -> dict[str, int]:
    return {Path(name).name: label for name, label in zip(images.names, labels.tolist(), strict=True)}


TABLES = {
    "val.txt": "0.png 145\n1.png 0\n\n2.png 1\n",
    "labels.csv": "Image,width,Label\n0.png,36,145\n1.png,36,0\n2.png,36,1\n",
    "list.tsv": "label\tpath\nn02056570\t0.png\nn01440764\t1.png\nn01443537\t2.png\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_file_of_labels_is_read(tmp_path, name):
    flat(tmp_path / "calib", 2)
    flat(tmp_path / "images", 3)
    (tmp_path / "images" / name).write_text(TABLES[name])
    calib = (str(tmp_path / "calib"),)
    for place in (tmp_path / "images", tmp_path / "images" / name):  # the folder, or the file itself
        found = load(tmp_path, 1000, data=None, calib_data=calib, test_data=(str(place),))
        assert labels_by_name(found.test_images, found.test_labels) == {"0.png": 145, "1.png": 0, "2.png": 1}
        assert found.classes == wnids() and found.train_labels is None
        assert sorted(Path(name).name for name in found.train_images.names) == ["0.png", "1.png"]


def test_file_of_labels_may_lie_beside_the_folder(tmp_path):
    """As Caffe's `val.txt`; and paths may have spaces."""
    names = flat(tmp_path / "data" / "val", 2)
    save(tmp_path / "data" / "val" / "an image.png", 99)
    flat(tmp_path / "data" / "train", 2)
    text = "".join(f"{name} {label}\n" for name, label in zip([*names, "an image.png"], (3, 4, 7), strict=True))
    (tmp_path / "data" / "val.txt").write_text(text)
    found = load(tmp_path, 10, data=tmp_path / "data")
    assert labels_by_name(found.test_images, found.test_labels) == {"0.png": 3, "1.png": 4, "an image.png": 7}
    assert len(found.classes) == 10
    given = load(tmp_path, 10, data=tmp_path / "data", test_data=(str(tmp_path / "data" / "val.txt"),))
    assert labels_by_name(given.test_images, given.test_labels)["an image.png"] == 7


@pytest.mark.parametrize("kind", ["inside", "beside"])
def test_texts_that_name_no_image_are_no_labels_where_none_are_needed(tmp_path, kind):
    flat(tmp_path / "calib", 2)
    for name in ("LICENSE.txt", "urls.txt") if kind == "inside" else ("../calib.txt",):
        (tmp_path / "calib" / name).write_text("Licence\n\nYou may use these images.\n")
    classes(tmp_path / "val", ("ant",))
    asked = {"calib_data": (f"{tmp_path}/calib",), "test_data": (f"{tmp_path}/val",)}
    assert len(load(tmp_path, 1, data=None, **asked).train_images) == 2
    (tmp_path / "calib" / "labels.csv").write_text('label,path\nant,"0.png"\n')  # this one is of labels
    found = load(tmp_path, 1, data=None, **asked)
    assert found.train_images.names == ("0.png",) and found.train_labels.tolist() == [0]
    (tmp_path / "calib" / "labels.csv").write_text('label,path\nant,"0.png"\nant\n')
    with pytest.raises(BenchmarkError, match=r"line 3: \['ant'\] lacks a path or a label"):
        load(tmp_path, 1, data=None, **asked)


def test_flat_images_may_lie_in_the_current_directory(tmp_path, monkeypatch):
    flat(tmp_path / "images", 2)
    (tmp_path / "images.txt").write_text("0.png 1\n1.png 0\n")
    monkeypatch.chdir(tmp_path / "images")
    found = load(tmp_path, 2, data=None, calib_data=(".",), test_data=(".",))
    assert labels_by_name(found.test_images, found.test_labels) == {"0.png": 1, "1.png": 0}


def test_flat_folder_serves_for_everything_in_halves_that_stay(tmp_path):
    names = flat(tmp_path / "images", 9)
    (tmp_path / "images" / "val.txt").write_text("".join(f"{name} {index}\n" for index, name in enumerate(names)))
    found, again = (load(tmp_path, 9, data=tmp_path / "images", n_calib=number) for number in (1, 3))
    assert found.test_images.names == again.test_images.names
    trained, tested = set(found.train_images.names), set(found.test_images.names)
    assert (len(trained), len(tested)) == (4, 5) and trained | tested == set(names)
    for images, labels in ((found.train_images, found.train_labels), (found.test_images, found.test_labels)):
        assert all(name == f"{label}.png" for name, label in labels_by_name(images, labels).items())


def test_folds_test_every_image_once_and_hold_out_what_quantization_takes(tmp_path):
    names = flat(tmp_path / "images", 9)
    (tmp_path / "images" / "val.txt").write_text("".join(f"{name} {index}\n" for index, name in enumerate(names)))
    found = load(tmp_path, 9, data=tmp_path / "images", n_calib=2, test_folds=2)
    assert (len(found.train_images), len(found.test_images)) == (2, 7)
    (fit, test), (other_fit, other_test) = [tuple(map(set, map(torch.Tensor.tolist, fold))) for fold in found.folds()]
    assert (fit, test) == (other_test, other_fit) and fit | test == set(range(7)) and not fit & test
    with pytest.raises(BenchmarkError, match="9 images serve for everything, of which quantization takes 9; lower --n"):
        load(tmp_path, 9, data=tmp_path / "images", n_calib=9, test_folds=2)


def classes(folder: Path, names, number: int = 1) -> None:
    for place, name in enumerate(names):
        for index in range(number):
            save(folder / name / f"{name}_{index}.png", 20 * place + index)


def test_val_that_lacks_classes_goes_by_those_of_train(tmp_path):
    classes(tmp_path / "train", ("ant", "bee", "cat", "dog"))
    classes(tmp_path / "val", ("bee", "dog"))
    found = load(tmp_path, 4, data=tmp_path)
    assert found.classes == ("ant", "bee", "cat", "dog") and found.test_labels.tolist() == [1, 3]
    assert output_count(Request(data=tmp_path, cache=tmp_path)) == 4


def test_val_of_wnids_goes_by_imagenets_or_by_those_of_train_as_the_network_has_outputs(tmp_path):
    classes(tmp_path / "train", REAL)
    classes(tmp_path / "val", REAL[1:])
    request = Request(data=tmp_path, cache=tmp_path)
    assert [output_count(request, known) for known in (None, 3, 1000)] == [3, 3, 1000]
    assert load(tmp_path, 3, data=tmp_path).test_labels.tolist() == [1, 2]
    assert load(tmp_path, 1000, data=tmp_path).test_labels.tolist() == [1, 145]
    for call in (lambda: load(tmp_path, 7, data=tmp_path), lambda: output_count(request, 7)):
        with pytest.raises(
            BenchmarkError, match="the model has 7 outputs, the data 3 or 1,000 classes: n01440764, n01443537"
        ):
            call()


def test_numbers_go_by_the_class_folders_of_train_first(tmp_path):
    classes(tmp_path / "train", REAL)
    listed("0.png 0\n1.png 2\n")(tmp_path)
    asked = {"calib_data": (str(tmp_path / "train"),), "test_data": (str(tmp_path / "images"),)}
    request = Request(data=None, cache=tmp_path, **asked)
    assert [output_count(request, known) for known in (None, 3, 1000)] == [3, 3, 1000]
    with pytest.raises(BenchmarkError, match="the model has 21,843 outputs, the data 3 or 1,000 classes"):
        output_count(request, 21843)  # of other classes, if their number is known before
    with pytest.raises(
        BenchmarkError, match="1 label of test images not among the classes: 2; expected those of 0 to 1"
    ):
        output_count(request, 2)
    assert load(tmp_path, 3, data=None, **asked).classes == REAL
    assert load(tmp_path, 5, data=None, **asked).classes == ("0", "1", "2", "3", "4")


def test_names_that_look_like_numbers_go_by_a_list_that_has_them(tmp_path):
    listed("0.png 7\n1.png zebra\n")(tmp_path)
    (tmp_path / "classes.txt").write_text("zebra\n7\n8\n")
    found = load(tmp_path, 3, data=tmp_path / "images", classes=tmp_path / "classes.txt", n_calib=1, test_folds=2)
    assert found.classes == ("zebra", "7", "8")
    (tmp_path / "images" / "val.txt").write_text("0.png 9\n1.png zebra\n")
    with pytest.raises(BenchmarkError, match="not among the classes: 9; expected those of the list of --classes"):
        load(tmp_path, 3, data=tmp_path / "images", classes=tmp_path / "classes.txt", n_calib=1, test_folds=2)


def test_a_list_of_classes_is_for_as_many_outputs_though_labels_are_numbers(tmp_path):
    listed("0.png 0\n1.png 2\n")(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    given = {"data": tmp_path / "images", "classes": tmp_path / "classes.txt", "n_calib": 1, "test_folds": 2}
    assert load(tmp_path, 3, **given).classes == ("ant", "bee", "cat")
    for call in (
        lambda: load(tmp_path, 1000, **given),
        lambda: output_count(Request(cache=tmp_path, **given), 1000),
    ):
        with pytest.raises(BenchmarkError, match="the model has 1,000 outputs, the data 3 classes: ant, bee, cat"):
            call()


def test_folders_of_images_for_quantization_need_be_no_classes(tmp_path):
    classes(tmp_path / "photos", ("2020", "2021"))
    classes(tmp_path / "val", REAL)
    places = {"calib_data": (str(tmp_path / "photos"),), "test_data": (str(tmp_path / "val"),)}
    found = load(tmp_path, 1000, data=None, **places)
    assert found.test_labels.tolist() == [0, 1, 145] and len(found.train_images) == 2 and found.train_labels is None


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    classes(tmp_path / "val", ("ant", "bee"))
    for name in (".thumbs/ant_0.png", "bee/.thumbs/bee_0.png", "ant/._ant_0.png"):
        save(tmp_path / "val" / name, 1)
    (tmp_path / "val" / ".ipynb_checkpoints").mkdir()
    flat(tmp_path / "calib", 2)
    found = load(tmp_path, 2, data=None, calib_data=(f"{tmp_path}/calib",), test_data=(f"{tmp_path}/val",))
    assert labels_by_name(found.test_images, found.test_labels) == {"ant_0.png": 0, "bee_0.png": 1}
    assert len(found.test_images) == 2


def test_list_of_classes_decides(tmp_path):
    classes(tmp_path / "train", REAL)
    classes(tmp_path / "val", REAL[1:])
    (tmp_path / "list.txt").write_text(f"{REAL[2]} king penguin\n{REAL[1]} goldfish, Carassius\n{REAL[0]} tench\n")
    found = load(tmp_path, 3, data=tmp_path, classes=tmp_path / "list.txt")
    assert found.classes == REAL[::-1] and found.test_labels.tolist() == [1, 0]


def test_list_of_classes_may_begin_with_a_byte_order_mark(tmp_path):
    classes(tmp_path / "train", ("ant", "bee"))
    classes(tmp_path / "val", ("ant", "bee"))
    (tmp_path / "list.txt").write_text("bee\nant\n", "utf-8-sig")
    (tmp_path / "first.txt").write_text("ant\nbee\n", "utf-8-sig")
    for name, labels in (("list", [1, 0]), ("first", [0, 1])):
        assert load(tmp_path, 2, data=tmp_path, classes=tmp_path / f"{name}.txt").test_labels.tolist() == labels


def test_places_may_be_three_and_several_to_test_on(tmp_path):
    flat(tmp_path / "calib", 3)
    flat(tmp_path / "cat", 4)
    classes(tmp_path / "val", REAL[1:])
    classes(tmp_path / "more", REAL[:2])
    places = {name: (str(tmp_path / name),) for name in ("calib", "cat")}
    tests = tuple(str(tmp_path / name) for name in ("val", "more"))
    found = load(tmp_path, 1000, data=None, calib_data=places["calib"], cat_data=places["cat"], test_data=tests)
    assert [Path(name).parts[0] for name in found.test_images.names] == ["val", "val", "more", "more"]
    assert found.test_labels.tolist() == [1, 145, 0, 1]
    calib, cat = found.split(3, 2, seed=0)
    assert {(calib.root / name).parent.name for name in calib.names} == {"calib"} and len(calib) == 3
    assert {(cat.root / name).parent.name for name in cat.names} == {"cat"} and len(set(cat.names)) == 2
    with pytest.raises(BenchmarkError, match="5 images are asked for, there are 4; lower --n-calib or --n-cat"):
        found.split(3, 5, seed=0)
    before = found.digest()
    save(tmp_path / "cat" / "4.png", 1)
    assert load(tmp_path, 1000, data=None, calib_data=places["calib"], cat_data=places["cat"], test_data=tests)
    changed = load(tmp_path, 1000, data=None, calib_data=places["calib"], cat_data=places["cat"], test_data=tests)
    assert changed.digest() != before


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (36, 36), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_shards_are_unpacked_once_with_their_labels(tmp_path, kind):
    pytest.importorskip("webdataset")
    label = (
        (lambda value: str(value).encode()) if kind == "cls" else (lambda value: json.dumps({"label": value}).encode())
    )
    for number in range(2):  # both count their samples from 0
        members = {f"{key:03d}.png": png(100 * number + key) for key in range(2)}
        members |= {f"{key:03d}.{kind}": label(10 * number + key) for key in range(2)}
        shard(tmp_path / "shards" / f"val-{number}.tar", dict(sorted(members.items())))
    flat(tmp_path / "calib", 2)
    for place in (f"{tmp_path}/shards/val-{{0..1}}.tar", f"{tmp_path}/shards"):
        found = load(tmp_path, 20, data=None, calib_data=(str(tmp_path / "calib"),), test_data=(place,))
        assert found.test_labels.tolist() == [0, 1, 10, 11]
        pixels = [Image.open(found.test_images.root / name).getpixel((0, 0))[0] for name in found.test_images.names]
        assert pixels == [0, 1, 100, 101]
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1


def test_plain_tar_files_keep_folders_and_names(tmp_path):
    pytest.importorskip("webdataset")
    shard(tmp_path / "train.tar", {f"train/{name}/{name}_0.png": png(place) for place, name in enumerate(REAL)})
    shard(tmp_path / "val.tar", {"images/a.png": png(50), "images/b.png": png(60)})
    (tmp_path / "val.txt").write_text("b.png 145\na.png 1\n")
    found = load(tmp_path, 1000, data=None, calib_data=(f"{tmp_path}/train.tar",), test_data=(f"{tmp_path}/val.tar",))
    assert labels_by_name(found.test_images, found.test_labels) == {"a.png": 1, "b.png": 145}
    assert found.train_labels.tolist() == [0, 1, 145]


@pytest.mark.parametrize("place", ["images", "images/bee"])
def test_archive_left_beside_images_is_left_alone(tmp_path, place):
    classes(tmp_path / "images", ("ant", "bee"))
    shard(tmp_path / place / "ILSVRC2012_img_val.tar", {"a.png": png(1)})
    found = load(tmp_path, 2, data=None, calib_data=(f"{tmp_path}/images/bee",), test_data=(f"{tmp_path}/images",))
    assert found.classes == ("ant", "bee") and found.test_labels.tolist() == [0, 1] and len(found.train_images) == 1


@pytest.mark.parametrize("name", ["val.tgz", "val.tar.gz", "val.TAR"])
def test_labels_beside_a_tar_file_are_found_whatever_its_ending(tmp_path, name):
    pytest.importorskip("webdataset")
    place = tmp_path / "some.tar.files" / name
    shard(place, {"a.png": png(50), "b.png": png(60)})
    if name != "val.TAR":
        place.write_bytes(gzip.compress(place.read_bytes()))
    place.with_name("val.txt").write_text("b.png 1\na.png 0\n")
    found = load(tmp_path, 2, data=None, calib_data=(str(place),), test_data=(str(place),))
    assert labels_by_name(found.test_images, found.test_labels) == {"a.png": 0, "b.png": 1}


def test_every_image_of_a_name_up_to_the_first_dot_is_unpacked(tmp_path):
    pytest.importorskip("webdataset")
    names = [f"frame.{number:03d}.{ending}" for number, ending in enumerate(("jpg", "png", "JPG", "png", "png"))]
    shard(tmp_path / "calib.tar", dict.fromkeys(names, png(1)))
    classes(tmp_path / "val", ("ant",))
    found = load(tmp_path, 1, data=None, calib_data=(f"{tmp_path}/calib.tar",), test_data=(f"{tmp_path}/val",))
    assert sorted(Path(name).name for name in found.train_images.names) == sorted(names)


def test_names_in_tar_files_keep_their_case(tmp_path):
    """As files of labels have them; endings of labels are found in any."""
    pytest.importorskip("webdataset")
    shard(tmp_path / "val.tar", {"v_0.JPEG": png(1), "v_1.JPEG": png(2)})
    (tmp_path / "val.txt").write_text("v_0.JPEG 1\nv_1.JPEG 0\n")
    shard(tmp_path / "labelled.tar", {"a.CLS": b"1", "a.PNG": png(1), "b.CLS": b"0", "b.PNG": png(2)})
    tests = f"{tmp_path}/val.tar", f"{tmp_path}/labelled.tar"
    found = load(tmp_path, 2, data=None, calib_data=(tests[0],), test_data=tests)
    names = {"v_0.JPEG": 1, "v_1.JPEG": 0, "a.PNG": 1, "b.PNG": 0}
    assert labels_by_name(found.test_images, found.test_labels) == names


def test_images_of_one_name_in_shards_of_one_name_are_all_unpacked(tmp_path):
    pytest.importorskip("webdataset")
    for color, folder in enumerate("abc"):
        shard(tmp_path / folder / "s.tar", {"x.png": png(color)})
    classes(tmp_path / "val", ("ant",))
    place = f"{tmp_path}/{{a,b,c}}/s.tar"
    images = load(tmp_path, 1, data=None, calib_data=(place,), test_data=(f"{tmp_path}/val",)).train_images
    assert sorted(Image.open(images.root / name).getpixel((0, 0))[0] for name in images.names) == [0, 1, 2]


def test_braces_that_do_not_close_are_refused(tmp_path):
    pytest.importorskip("webdataset")
    with pytest.raises(BenchmarkError, match=r"val-\{0\.\.1\.tar: .*; expected braces as in val-\{000\.\.007\}\.tar"):
        load(tmp_path, 2, data=None, test_data=(f"{tmp_path}/val-{{0..1.tar",))


def listed(text, name="val.txt"):
    def damage(root):
        flat(root / "images", 2)
        (root / "images" / name).write_text(text)

    return damage


def strange_wnid(root):
    classes(root / "images", ("n01440764", "n99999999"))


def two_files(root):
    flat(root / "images", 1)
    for name in ("a.txt", "b.csv"):
        (root / "images" / name).write_text("0.png 1\n")


def numbers_and_names(root):
    listed("0.png 1\n1.png 2\n")(root)
    classes(root / "more", REAL)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            listed("0.png 1\n1.png 1000\n"),
            r"1 label of test images not among the classes: 1000; .* 0 to 999, the out",
        ),
        (
            listed("0.png 1\n1.png -1\n"),
            r"images: some labels are numbers, others are not: -1 \(-1 is that of 1\.png\); expected numbers",
        ),
        (listed("0.png 1.5\n1.png 2\n"), r"others are not: 1\.5 .*, or names of classes, for all"),
        (
            listed("0.png 1\n9.png 2\n"),
            r"val\.txt names 1 image of 2 not there, such as 9\.png; looked in \S+s$",
        ),
        (
            listed("0.png n01440764\n1.png n99999999\n"),
            r"not among the classes: n99999999; expected .* ImageNet's wnids",
        ),
        (strange_wnid, r"images: 1 label of test images not among the classes: n99999999"),
        (listed("0.png 1\n1.png\n"), r"val\.txt, line 2: '1\.png' has no label; expected `path label` a line"),
        (listed("\n"), r"val\.txt holds no labels; expected"),
        (listed("0.png,1\n1.png,2\n", "val.csv"), r"val\.csv has no header, its first line is an image"),
        (
            listed("path,size\n0.png,1\n", "val.csv"),
            r"val\.csv has no column of labels: its header is \['path', 'size'\]",
        ),
        (
            listed("path,label\n0.png,1\n1.png,\n", "val.csv"),
            r"val\.csv, line 3: \['1\.png', ''\] lacks a path or a label",
        ),
        (
            listed("0.png 0\n1.png 20231127\n"),
            r"images: label 20231127 cannot be the number of a class, which are below 1,000,000; expected labels",
        ),
        (listed("0.png 1000000\n1.png 2\n"), r"label 1000000 cannot be the number"),
        (listed(f"0.png {'9' * 5000}\n1.png 2\n"), r"label 9{20}\.\.\. cannot be the number"),
        (
            listed(f'path,label\n0.png,"{"a" * 200_000}"\n', "val.csv"),
            r"val\.csv cannot be read as a table: field larger than field limit \(131072\); expected",
        ),
        (listed(f"{'a' * 5000}.png 1\n1.png 2\n"), r"val\.txt names 1 image of 2 not there, such as aaa"),
        (two_files, r"holds several files that may be of labels \(a\.txt, b\.csv\); give one of them itself"),
        (lambda root: flat(root / "images", 2), r"images/ holds 2 images that are not sorted into class folders"),
        (lambda root: (root / "images").mkdir(), r"images/ is empty"),
        (lambda root: None, r"images does not exist; expected .* or tar files"),
    ],
)
def test_places_that_cannot_be_used_are_refused(tmp_path, damage, message):
    damage(tmp_path)
    classes(tmp_path / "calib", REAL)
    asked = {"calib_data": (str(tmp_path / "calib"),), "test_data": (str(tmp_path / "images"),)}
    with pytest.raises(BenchmarkError, match=message) as error:
        load(tmp_path, 1000, data=None, **asked)
    assert "\n" not in str(error.value)


def test_numbers_and_names_do_not_mix(tmp_path):
    numbers_and_names(tmp_path)
    places = (str(tmp_path / "images"), str(tmp_path / "more"))
    with pytest.raises(BenchmarkError, match=r"labels of \S+images are numbers, those of \S+more names of classes"):
        load(tmp_path, 1000, data=None, test_data=places)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "lists a twice"),
        ("\n", "lists no class"),
        (None, "cannot be read"),
        ("a\nb\n", "list of --classes"),
    ],
)
def test_lists_of_classes_that_cannot_be_used_are_refused(tmp_path, text, message):
    classes(tmp_path / "train", ("a", "b", "c"))
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        load(tmp_path, 2, data=tmp_path, classes=tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, r"no such file: \S+1\.tar, one of 2 tar files"),
        (b"no archive at all" * 100, r"0\.tar cannot be read as a tar file"),
        ({"readme.md": b"text"}, r"holds no images; known are files that end in jpg"),
        ({"../a.png": png(1)}, r"0\.tar holds \.\./a, which is outside"),
        ({"a.png": png(1), "b.cls": b"1", "b.png": png(2)}, r"1 of 2 images have no label"),
        ({"a.cls": b"1", "a.0.png": png(1), "a.1.png": png(2)}, r"0\.tar: one label and 2 images are called a up to"),
        ({"a.png": png(1), "a.png/b.png": png(2)}, r"0\.tar: 'a\.png/b\.png' in it cannot be unpacked: "),
        ({"caf\udce9.png": png(1)}, r"0\.tar: 'caf\\udce9\.png' in it cannot be unpacked: .* can't encode"),
    ],
    ids=["missing", "damaged", "no images", "outside", "labels missing", "one label", "file as folder", "no utf-8"],
)
def test_tar_files_that_cannot_be_used_are_refused(tmp_path, members, message):
    pytest.importorskip("webdataset")
    place = f"{tmp_path}/0.tar"
    if isinstance(members, bytes):
        Path(place).write_bytes(members)
    else:
        shard(Path(place), members or {"a.png": png(1)})
    if members is None:
        place = f"{tmp_path}/{{0..1}}.tar"
    with pytest.raises(BenchmarkError, match=message):
        load(tmp_path, 2, data=None, test_data=(place,))
    assert not list((tmp_path / "cache").glob("shards/*"))


def test_what_reads_tar_files_is_only_needed_for_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    shard(tmp_path / "val.tar", {"a.png": png(1)})
    with pytest.raises(BenchmarkError, match=r"webdataset, which reads tar files, .*; pip install webdataset"):
        load(tmp_path, 2, data=None, test_data=(f"{tmp_path}/val.tar",))


def fails(image):
    raise TypeError("no such\nimage")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (fails, r"the transform fails on \S+0\.png: TypeError: no such$"),
        (lambda image: image, r"the transform makes Image of an image; expected a float32 tensor"),
        (lambda image: torch.zeros(1, 3, 8, 8), r"makes \(1, 3, 8, 8\) torch\.float32"),
    ],
)
def test_transform_that_makes_no_image_is_refused(tmp_path, transform, message):
    listed("0.png 1\n1.png 1\n")(tmp_path)
    asked = Request(data=tmp_path / "images", cache=tmp_path, transform=transform, outputs=lambda image: 2)
    with pytest.raises(BenchmarkError, match=message):
        load_imagenet(asked)
