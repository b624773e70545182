"""VQ tokens taken from another store: equal to the byte to those made anew, linked where they can be."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from toy_images import NoiseSource
from toy_store import SMALL, Stop, ToyTokenizer, contents, write

from digit.data import rows
from digit.data.tokens import TokenStore
from digit.errors import MismatchError

OTHER = dict(discriminative=ToyTokenizer(vocab_size=77))


class SameData(NoiseSource):
    """Noise pictures that are one data set, whichever can be read at the moment."""

    def __init__(self, broken: tuple[int, ...]):
        super().__init__(broken=broken)
        self.fingerprint = "one data set"


class NeverAsked(ToyTokenizer):
    """A VQGAN that must not be run."""

    def encode(self, images):
        raise AssertionError("the VQ tokens were to be taken")


def taking(folder, first, **changes) -> TokenStore:
    vq = NeverAsked(4, 65536, "vq")
    return write(folder, vq=vq, vq_tokens=first, **(OTHER | changes))


@pytest.mark.parametrize("shards", [{}, {"shard_bytes": 32 * 7}], ids=["one file", "shards"])
@pytest.mark.parametrize("broken", [(), (0, 4, 5)], ids=["whole", "broken"])
def test_taken_tokens_are_those_made_anew(tmp_path, broken, shards):
    source = dict(source=NoiseSource(broken=broken), **shards)
    write(tmp_path / "first", **source)
    write(tmp_path / "anew", **OTHER, **source)
    taking(tmp_path / "taken", tmp_path / "first", **source)
    assert contents(tmp_path / "taken") == contents(tmp_path / "anew")
    for path in (tmp_path / "first").glob("vq*.npy"):
        assert os.path.samefile(path, tmp_path / "taken" / path.name)


def test_they_are_copied_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    write(tmp_path / "first")
    monkeypatch.setattr(rows.os, "link", no_links)
    taking(tmp_path / "taken", tmp_path / "first")
    one, other = (tmp_path / name / "vq.npy" for name in ("first", "taken"))
    assert one.read_bytes() == other.read_bytes() and not os.path.samefile(one, other)


@pytest.mark.parametrize("shards", [{}, {"shard_bytes": 32 * 7}], ids=["one file", "shards"])
@pytest.mark.parametrize(("before", "now"), [((2,), (5,)), ((), (1, 7)), ((0, 11), ())])
def test_images_that_either_store_could_not_read_are_left_out(tmp_path, before, now, shards):
    write(tmp_path / "first", source=SameData(before), **shards)
    write(tmp_path / "both", source=SameData((*before, *now)), **OTHER, **shards)
    taken = taking(tmp_path / "taken", tmp_path / "first", source=SameData(now), **shards)
    assert contents(tmp_path / "taken") == contents(tmp_path / "both")
    assert len(taken.manifest["bad"]) == len({*before, *now})


def test_a_subset_of_the_images(tmp_path):
    chosen = dict(indices=[9, 3, 4, 7], source=SameData((4,)))
    write(tmp_path / "first", **chosen)
    write(tmp_path / "anew", **OTHER, **chosen)
    taking(tmp_path / "taken", tmp_path / "first", **chosen)
    assert contents(tmp_path / "taken") == contents(tmp_path / "anew")
    with pytest.raises(MismatchError, match="source.num_images"):
        taking(tmp_path / "more", tmp_path / "first", source=SameData((4,)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(seed=6), "seed = 5, now asked for 6"),
        (dict(crops_per_image=2), "crops_per_image = 3, now asked for 2"),
        (dict(preprocess=replace(SMALL, flip=False)), "preprocessing.flip = True, now asked for False"),
        (dict(source=NoiseSource(13)), "source.fingerprint|source.num_images"),
        (dict(vq=ToyTokenizer(4, 65536, "other")), "vqgan_hash"),
    ],
    ids=["seed", "crops", "flip", "data", "vqgan"],
)
def test_tokens_of_other_crops_or_another_vqgan_are_refused(tmp_path, changes, said):
    write(tmp_path / "first")
    with pytest.raises(MismatchError, match=said):
        write(tmp_path / "second", **(OTHER | dict(vq_tokens=tmp_path / "first") | changes))
    assert not (tmp_path / "second").exists()


def test_the_size_that_the_encoder_sees_may_differ(tmp_path):
    write(tmp_path / "first")
    other = replace(SMALL, encoder_size=6)
    taken = taking(tmp_path / "second", tmp_path / "first", preprocess=other)
    assert np.array_equal(taken.vq, TokenStore.open(tmp_path / "first").vq)
    with pytest.raises(MismatchError, match="preprocessing.path"):
        taking(tmp_path / "third", tmp_path / "first", preprocess=replace(other, path="released_kmeans"))


@pytest.mark.parametrize("stop_at", [1, 2, 5, 9])
def test_an_interrupted_run_goes_on_and_ends_byte_identical(tmp_path, stop_at):
    source = dict(source=NoiseSource(broken=(5,)))
    write(tmp_path / "first", **source)
    write(tmp_path / "whole", **OTHER, **source)
    with pytest.raises(Stop):
        taking(
            tmp_path / "t", tmp_path / "first", discriminative=ToyTokenizer(vocab_size=77, stop_at=stop_at), **source
        )
    with pytest.raises(MismatchError, match="vq_tokens"):
        write(tmp_path / "t", **OTHER, **source)  # half of one kind and half of the other would not fit
    taking(tmp_path / "t", tmp_path / "first", **source)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    write(tmp_path / "t", **OTHER, **source)  # once finished, it is equal wherever its tokens are from


def test_a_finished_store_needs_the_other_one_no_longer(tmp_path):
    write(tmp_path / "first")
    taken = taking(tmp_path / "taken", tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    assert np.array_equal(taking(tmp_path / "taken", tmp_path / "first").vq, taken.vq)
    with pytest.raises(MismatchError, match="seed = 5, now asked for 6"):  # its own settings decide as before
        taking(tmp_path / "taken", tmp_path / "first", seed=6)
