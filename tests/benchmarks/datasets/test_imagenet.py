"""Folders in ImageNet's layout, whole and damaged."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import BenchmarkError
from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.datasets.description import Request
from benchmarks.datasets.imagenet import load_imagenet
from benchmarks.datasets.images import batches, stacked
from benchmarks.measure import network_logits
from benchmarks.measure.network_logits import network_sources, paired_logits
from benchmarks.measure.paired_logits import PairedLogits
from benchmarks.measure.protocol import Protocol, Setting
from benchmarks.networks.weights_and_transforms import untrained
from tests.benchmarks.conftest import SMALL, WNIDS


def load(root):
    return load_imagenet(Request(data=root, cache=root.parent / "cache", transform=SMALL))


def test_labels_are_those_of_the_folders(shared_imagenet):
    dataset = load(shared_imagenet)
    assert dataset.name == "imagenet" and dataset.classes == WNIDS
    assert (len(dataset.train_images), len(dataset.test_images)) == (42, 15)
    for images, labels, part in [
        (dataset.train_images, dataset.train_labels, "train"),
        (dataset.test_images, dataset.test_labels, "val"),
    ]:
        folders = [name.split("/") for name in images.names]
        assert [folder[0] for folder in folders] == [part] * len(images)
        assert [WNIDS.index(folder[1]) for folder in folders] == labels.tolist()


def test_a_cpu_gets_fewer_images_at_a_time(shared_imagenet, tmp_path):
    asked = Request(data=shared_imagenet, cache=tmp_path, transform=SMALL)
    for accelerated, expected in ((False, [16, 16, 10]), (True, [42])):
        dataset = load_imagenet(replace(asked, accelerated=accelerated))
        assert [len(batch) for batch in batches(dataset.train_images)] == expected


def remove_part(root):
    shutil.rmtree(root / "val")


def empty_part(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def flatten_val(root):
    for folder in list((root / "val").iterdir()):
        for path in folder.iterdir():
            path.rename(root / "val" / f"{folder.name}_{path.name}")
        folder.rmdir()


def rename_class(root):
    (root / "val" / WNIDS[1]).rename(root / "val" / "zebra")


def empty_class(root):
    for path in (root / "train" / WNIDS[2]).iterdir():
        path.unlink()


def archive(root):
    shutil.rmtree(root)
    root.write_bytes(b"PK")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove_part,
            r"imagenet/val/ is missing; expected train/<class>/\*\.JPEG and val/<class>.*, found train; --test-data ",
        ),
        (empty_part, r"imagenet/train/ is empty; expected train/<class>"),
        (flatten_val, r"imagenet/val/ holds 15 images that are not sorted into class folders and have no file"),
        (
            rename_class,
            r"imagenet/val: 1 label of test images not among the classes: zebra; expected those of the class fol",
        ),
        (empty_class, r"imagenet/train/ has classes without images: .*n00000100"),
        (archive, r"imagenet is a file, and none of labels \(\.txt, \.csv, \.tsv\) nor a tar file; expected train"),
        (shutil.rmtree, r"imagenet does not exist; expected train"),
    ],
)
def test_damaged_folders_are_refused(imagenet_folder, damage, message):
    damage(imagenet_folder)
    with pytest.raises(BenchmarkError, match=message):
        load(imagenet_folder)


def rename_image(root, part):
    path = next((root / part / WNIDS[0]).iterdir())
    path.rename(path.with_name("other.JPEG"))


def relabel_image(root, part):
    path = next((root / part / WNIDS[0]).iterdir())
    path.rename(root / part / WNIDS[1] / "moved.JPEG")


def change_image(root, part):
    path = next((root / part / WNIDS[0]).iterdir())
    Image.new("RGB", (60, 60)).save(path)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("change", [rename_image, relabel_image, change_image])
def test_digest_changes_with_images_and_labels(imagenet_folder, part, change):
    before = load(imagenet_folder)
    whole, test = before.digest(), before.test_digest()
    assert (load(imagenet_folder).digest(), load(imagenet_folder).test_digest()) == (whole, test)
    change(imagenet_folder, part)
    after = load(imagenet_folder)
    assert after.digest() != whole
    assert (after.test_digest() != test) == (part == "val")


def test_digest_of_the_val_part_sees_every_byte(imagenet_folder):
    before = load(imagenet_folder).test_digest()
    path = imagenet_folder / "val" / WNIDS[1] / "val_3.JPEG"
    changed, then = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(changed[:-3] + bytes([changed[-3] ^ 1]) + changed[-2:])
    os.utime(path, ns=(then, then + 10**6))
    assert load(imagenet_folder).test_digest() != before


SETTING, PROTOCOL = Setting("rtn", 4, 4, seed=1), Protocol(iters=1, n_calib=8, n_cat=16, batch_size=4)


@pytest.mark.parametrize(("part", "role"), [(0, "8 images for quantization"), (1, "16 images for corrections")])
def test_val_file_among_the_training_files_is_found_where_it_is_drawn(imagenet_folder, part, role):
    names = load(imagenet_folder).train_images.names
    place = split_calibration(len(names), 8, 16, seed=1)[part][5]
    leaked = imagenet_folder / "val" / WNIDS[1] / "val_2.JPEG"
    shutil.copy(leaked, imagenet_folder / names[place])
    with pytest.raises(BenchmarkError) as error:
        paired_logits(SETTING, PROTOCOL, load(imagenet_folder), untrained("resnet18", 3))
    assert f"leak: 1 of {role} are test images, such as number 5 ({imagenet_folder / names[place]})" in str(error.value)
    assert f"({leaked})" in str(error.value)


def test_logits_are_not_taken_for_those_of_a_file_of_the_same_size(imagenet_folder, tmp_path, monkeypatch):
    model, dataset, made = untrained("resnet18", 3, seed=2), load(imagenet_folder), []

    def planted(*args, **options):
        made.append(torch.full((2, 3), float(len(made))))
        return PairedLogits(
            **{name: made[-1].clone() for name in ("fit_q", "fit_f", "test_q", "test_f")}, labels=torch.zeros(2).long()
        )

    def collect():
        network_sources([SETTING], PROTOCOL, load(imagenet_folder), "resnet18", model, tmp_path)
        return len(made)

    monkeypatch.setattr(network_logits, "paired_logits", planted)
    assert (collect(), collect()) == (1, 1)
    drawn = split_calibration(len(dataset.train_images), 8, 16, seed=1)[1][3]
    path = imagenet_folder / dataset.train_images.names[drawn]
    content, then = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    os.utime(path, ns=(then, then + 10**6))
    assert collect() == 2


def test_logits_are_those_of_the_drawn_images(shared_imagenet, cheap_ranges, monkeypatch):
    model, dataset, titles = untrained("resnet18", 3, seed=2), load(shared_imagenet), []
    monkeypatch.setattr(network_logits, "batches", lambda images, title: (titles.append(title), batches(images))[1])
    pairs = paired_logits(SETTING, PROTOCOL, dataset, model, progress=True)
    assert titles == ["images for quantization", "images for corrections", "test images"]
    calib, cat = split_calibration(len(dataset.train_images), 8, 16, seed=1)
    with torch.no_grad():
        for found, images in [
            (pairs.tuned_f, dataset.train_images[calib]),
            (pairs.fit_f, dataset.train_images[cat]),
            (pairs.test_f, dataset.test_images),
        ]:
            torch.testing.assert_close(found, model(stacked(images)))
    assert torch.equal(pairs.labels, dataset.test_labels)
