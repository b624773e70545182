"""The token store: aligned rows, exact resume, refused mismatches, broken images, files cut short, full disks."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy_images import NoiseSource, PatchEncoder
from toy_store import SMALL, Stop, ToyTokenizer, contents, write

from digit.data import token_writer as store_module
from digit.data.preprocess import PreprocessConfig
from digit.data.rows import ArrayFile
from digit.data.token_writer import write_tokens
from digit.data.tokens import TokenStore
from digit.errors import BadImageError, DigitError, MismatchError, Stopped
from digit.runtime import files
from digit.runtime.request import shown

FILES = ["discriminative.npy", "labels.npy", "manifest.json", "vq.npy"]


def test_rows_are_aligned_and_complete(tmp_path):
    from digit.data.loader import CropLoader

    store = write(tmp_path / "t")
    assert sorted(contents(tmp_path / "t")) == FILES
    assert (
        store.discriminative.shape == (36, 4)
        and store.vq.shape == (36, 16)
        and store.labels.shape == (36,)
        and len(store) == 36
    )
    assert store.discriminative.dtype == store.vq.dtype == np.uint16 and store.labels.dtype == np.int32
    (batch,) = CropLoader(NoiseSource(), SMALL, crops_per_image=3, seed=5, batch_size=36)
    assert np.array_equal(store.discriminative, ToyTokenizer().encode(batch.images))
    assert np.array_equal(store.vq, ToyTokenizer(4, 65536, "vq").encode(batch.images)) and store.vq.max() > 32767
    assert np.array_equal(store.labels, batch.labels)
    assert len(np.unique(np.asarray(store.discriminative), axis=0)) > 12  # the crops of an image differ


def test_manifest_says_what_made_it(tmp_path):
    manifest = write(tmp_path / "t").manifest
    assert (
        manifest["format"] == 2
        and manifest["rows"] == 36
        and manifest["crops_per_image"] == 3
        and manifest["seed"] == 5
    )
    assert manifest["discriminative"] == {"grid": [2, 2], "length": 4, "vocab_size": 1000}
    assert manifest["vq"] == {"grid": [4, 4], "length": 16, "vocab_size": 65536}
    assert manifest["codebook_hash"] == ToyTokenizer().fingerprint and manifest["vqgan_hash"] == "vq-65536-4"
    source = NoiseSource()
    assert manifest["source"] == {"name": "noise", "fingerprint": source.fingerprint, "num_images": 12, "subset": None}
    assert manifest["preprocessing"]["image_size"] == 8 and manifest["classes"] == ["a", "b"] and manifest["bad"] == []


def test_one_tokenizer_alone(tmp_path):
    store = write_tokens(tmp_path / "d", NoiseSource(), SMALL, ToyTokenizer(), None, batch_size=5)
    assert store.vq is None and store.manifest["vq"] is None and set(store.batch([0])) == {"discriminative", "labels"}
    store = write_tokens(tmp_path / "v", NoiseSource(), SMALL, None, ToyTokenizer(), batch_size=5)
    assert (
        store.discriminative is None
        and store.manifest["codebook_hash"] is None
        and set(store.batches(2, 0)(0)) == {"vq", "labels"}
    )
    with pytest.raises(DigitError, match="no tokenizer"):
        write_tokens(tmp_path / "n", NoiseSource(), SMALL, None, None)


def test_describe_of_the_tokenizer_enters_the_manifest(tmp_path):
    from digit.tokenizers.discriminative import DiscriminativeTokenizer
    from digit.tokenizers.kmeans.codebook import Codebook

    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(8, 3)))
    store = write_tokens(tmp_path / "t", NoiseSource(), SMALL, tokenizer, None)
    assert store.manifest["encoder"]["name"] == "patches" and store.manifest["layer"] == -3
    assert store.manifest["codebook_hash"] == tokenizer.codebook.fingerprint
    store.check(codebook_hash=tokenizer.codebook.fingerprint)
    store.check(codebook_hash=tokenizer.fingerprint)


# ---- interrupted runs


@pytest.mark.parametrize("broken", [(), (0, 4, 5)], ids=["whole", "broken"])
@pytest.mark.parametrize("stop_at", [1, 2, 5, 9])
def test_interrupted_run_goes_on_and_ends_byte_identical(tmp_path, stop_at, broken):
    source = NoiseSource(broken=broken)
    write(tmp_path / "straight", source=source)
    last = ToyTokenizer(4, 65536, "vq", stop_at=min(stop_at, 7) if broken else stop_at)
    with pytest.raises(Stop):
        write(tmp_path / "stopped", source=source, vq=last)
    with pytest.raises(DigitError, match="not finished"):
        TokenStore.open(tmp_path / "stopped")
    rest = ToyTokenizer()
    write(tmp_path / "stopped", source=source, discriminative=rest)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    assert rest.calls + last.calls - 1 <= 9  # no batch is made twice


def test_killed_process_goes_on_byte_identical(tmp_path):
    """os._exit is a kill: no handler runs; without a journal since the start, everything is made again."""
    write(tmp_path / "straight", source=NoiseSource(broken=(7,)))
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom digit.data import token_writer\nfrom toy_images import *\n"
        "from toy_store import *\n"
        "token_writer.JOURNAL_EVERY_SECONDS = float(sys.argv[2])\n"
        "write(Path(sys.argv[1]), source=NoiseSource(broken=(7,)), "
        "discriminative=ToyTokenizer(stop_at=6, stop=lambda: os._exit(9)))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    for every, calls in (("0", 4), ("1e9", 9)):
        folder = tmp_path / f"killed{every}"
        ended = subprocess.run([sys.executable, "-c", program, str(folder), every], env=env)
        assert ended.returncode == 9
        rest = ToyTokenizer()
        (folder / ".journal.json.ab0_9xyz.aside.json").write_text("{")  # a kill while the journal was written
        write(folder, source=NoiseSource(broken=(7,)), discriminative=rest)
        assert contents(folder) == contents(tmp_path / "straight") and rest.calls == calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_batch(tmp_path, number):
    write(tmp_path / "straight")
    before = signal.getsignal(number)
    asked = ToyTokenizer(stop_at=3, stop=lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="tokens: 12 of 36 rows are done"):
        write(tmp_path / "stopped", discriminative=asked)
    assert asked.calls == 3 and signal.getsignal(number) == before
    rest = ToyTokenizer()
    write(tmp_path / "stopped", discriminative=rest)
    assert rest.calls == 6 and contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_a_second_interrupt_ends_the_run_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t", discriminative=ToyTokenizer(stop_at=3, stop=twice))
    rest = ToyTokenizer()
    assert len(write(tmp_path / "t", discriminative=rest)) == 36 and rest.calls == 7


def test_another_batch_size_makes_every_row(tmp_path):
    write(tmp_path / "straight")
    with pytest.raises(Stop):
        write(tmp_path / "stopped", discriminative=ToyTokenizer(stop_at=4))  # 12 rows are done
    rest = ToyTokenizer()
    write(tmp_path / "stopped", discriminative=rest, batch_size=7)
    assert rest.calls == 5 and contents(tmp_path / "stopped") == contents(tmp_path / "straight")


@pytest.mark.parametrize("broken", [(), (2,)], ids=["whole", "broken"])
@pytest.mark.parametrize("fail_at", [0, 1, 2, 3])
def test_kill_while_finishing(tmp_path, monkeypatch, fail_at, broken):
    """Stops between any two of these: rename discriminative, rename vq, rename labels, write the manifest."""
    source = NoiseSource(broken=broken)
    write(tmp_path / "straight", source=source)
    steps = []

    def stop_before(real):
        def step(*args):
            if not str(args[0]).endswith("journal.json"):
                if len(steps) == fail_at:
                    raise Stop
                steps.append(args)
            return real(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "copy_rows", stop_before(store_module.copy_rows))
        patch.setattr(store_module, "write_json", stop_before(store_module.write_json))
        with pytest.raises(Stop):
            write(tmp_path / "stopped", source=source)
    write(tmp_path / "stopped", source=source)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_left_over_journal_of_a_finished_store_is_removed(tmp_path):
    before = contents(write(tmp_path / "t").folder)
    (tmp_path / "t" / "journal.json").write_text("{}")
    (tmp_path / "t" / "discriminative.partial.npy").write_text("")
    untouched = ToyTokenizer()
    write(tmp_path / "t", discriminative=untouched)
    assert contents(tmp_path / "t") == before and untouched.calls == 0


# ---- mismatches


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "name", "here", "asked"),
    [
        (dict(seed=6), "seed", "5", "6"),
        (dict(crops_per_image=2), "crops_per_image", "3", "2"),
        (dict(discriminative=ToyTokenizer(name="other")), "codebook_hash", "toy-1000-2", "other-1000-2"),
        (dict(vq=ToyTokenizer(4, 65536, "vq2")), "vqgan_hash", "vq-65536-4", "vq2-65536-4"),
        (dict(source=NoiseSource(10)), "source.fingerprint", NoiseSource().fingerprint, NoiseSource(10).fingerprint),
        (
            dict(preprocess=PreprocessConfig(image_size=8, encoder_size=8, flip=False)),
            "preprocessing.flip",
            "True",
            "False",
        ),
        (dict(indices=list(range(12))), "source.subset", "None", ""),
    ],
)
def test_another_request_is_refused_with_both_values(tmp_path, finished, change, name, here, asked):
    if finished:
        write(tmp_path / "t")
    else:
        with pytest.raises(Stop):
            write(tmp_path / "t", discriminative=ToyTokenizer(stop_at=3))
    before = contents(tmp_path / "t")
    with pytest.raises(MismatchError) as error:
        write(tmp_path / "t", **change)
    assert f"{name} = {shown(here)}, now asked for {shown(asked)}" in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path / "t") == before


def test_check_names_both(tmp_path):
    store = write(tmp_path / "t")
    store.check()
    store.check(codebook_hash=ToyTokenizer().fingerprint, vqgan_hash="vq-65536-4")
    with pytest.raises(MismatchError, match=r"codebook toy-1000-2, asked for other"):
        store.check(codebook_hash="other")
    with pytest.raises(MismatchError, match=r"VQGAN vq-65536-4, asked for other"):
        store.check(vqgan_hash="other")


def test_vocabulary_must_fit_16_bits(tmp_path):
    with pytest.raises(DigitError, match="65537"):
        write(tmp_path / "t", discriminative=ToyTokenizer(2, 65537))
    assert not (tmp_path / "t").exists()


# ---- broken images


def test_rows_of_broken_images_are_dropped_and_named(tmp_path):
    store, whole = write(tmp_path / "b", source=NoiseSource(broken=(1, 11))), write(tmp_path / "w")
    keep = [row for row in range(36) if row // 3 not in (1, 11)]
    assert len(store) == 30 == store.manifest["rows"]
    for name in ("discriminative", "vq", "labels"):
        assert np.array_equal(getattr(store, name), getattr(whole, name)[keep])
    assert [key for key, _ in store.manifest["bad"]] == ["noise/1.png", "noise/11.png"]
    assert "broken on purpose" in store.manifest["bad"][0][1]


def test_too_many_broken_images(tmp_path):
    with pytest.raises(DigitError, match=r"max_bad_fraction 0.01.*noise/1.png"):
        write(tmp_path / "t", source=NoiseSource(broken=(1,)), max_bad_fraction=0.01)
    with pytest.raises(DigitError, match="none of the 3 images"):
        write(tmp_path / "n", source=NoiseSource(3, broken=(0, 1, 2)), max_bad_fraction=1.0)


def test_broken_images_count_over_all_sessions(tmp_path):
    source = NoiseSource(broken=(0, 11))
    with pytest.raises(Stop):
        write(tmp_path / "t", source=source, discriminative=ToyTokenizer(stop_at=4), max_bad_fraction=0.1)
    with pytest.raises(DigitError, match="2 of 12 images unreadable"):
        write(tmp_path / "t", source=source, max_bad_fraction=0.1)
    assert len(write(tmp_path / "t", source=source, max_bad_fraction=0.2)) == 30  # nothing was lost


# ---- files


def test_store_cut_short_or_damaged(tmp_path):
    write(tmp_path / "t")
    for name, size in (("discriminative.npy", 300), ("vq.npy", 40), ("labels.npy", 0)):
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        os.truncate(path, size)
        with pytest.raises(DigitError, match=rf"{name}.*digit tokenize") as error:
            TokenStore.open(tmp_path / "t")
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    TokenStore.open(tmp_path / "t")
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest | {"rows": 35}))
    with pytest.raises(DigitError, match="manifest"):
        TokenStore.open(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(DigitError, match="format 3, this version reads 2"):
        TokenStore.open(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(DigitError, match=r"manifest.json is damaged"):
        TokenStore.open(tmp_path / "t")


@pytest.mark.parametrize("name", ["manifest.json", "journal.json"])
def test_a_store_of_format_1_is_refused(tmp_path, name):
    """Opened, written to, or resumed: one line says which version made it and what to do."""
    folder = write(tmp_path / "t").folder
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 1}
    (folder / "manifest.json").unlink()
    entry = manifest if name == "manifest.json" else {"request": manifest, "done": [[0, 4]], "dropped": [], "notes": {}}
    (folder / name).write_text(json.dumps(entry))
    calls = [lambda: write(folder)] + [lambda: TokenStore.open(folder)] * (name == "manifest.json")
    for call in calls:
        with pytest.raises(
            DigitError, match=r"format 1, written by digit 0\.1.*digit tokenize.*or use digit 0\.1"
        ) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", ["2", "1", '"format"', "[2]", "null"])
def test_a_manifest_that_is_no_dictionary_is_refused(tmp_path, manifest):
    folder = write(tmp_path / "t").folder
    (folder / "manifest.json").write_text(manifest)
    for call in (lambda: write(folder), lambda: TokenStore.open(folder)):
        with pytest.raises(DigitError, match="format None"):
            call()


def test_folders_without_a_store(tmp_path):
    with pytest.raises(DigitError, match="holds no tokens"):
        TokenStore.open(tmp_path / "nowhere")
    np.save(tmp_path / "discriminative.npy", np.zeros(3))
    with pytest.raises(DigitError, match=r"discriminative.npy but no manifest"):
        write(tmp_path)
    assert sorted(contents(tmp_path)) == ["discriminative.npy"]


def test_damaged_leftovers_are_told(tmp_path):
    with pytest.raises(Stop):
        write(tmp_path / "t", discriminative=ToyTokenizer(stop_at=3))
    (tmp_path / "t" / "vq.partial.npy").unlink()
    with pytest.raises(DigitError, match="cannot be continued"):
        write(tmp_path / "t")
    (tmp_path / "t" / "journal.json").write_text('{"request": 1}')
    with pytest.raises(DigitError, match=r"journal.json is damaged"):
        write(tmp_path / "t")


def test_full_disk_while_writing_is_resumable(tmp_path, monkeypatch):
    write(tmp_path / "straight")
    real, rows = ArrayFile.write, []

    def write_rows(self, row, values):
        rows.append(row)
        if len(rows) == 10:
            with files.disk_errors(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(self, row, values)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFile, "write", write_rows)
        with pytest.raises(DigitError, match="disk full") as error:
            write(tmp_path / "full")
    assert "\n" not in str(error.value)
    write(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "straight")


def test_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.fstat(handle).st_size > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DigitError, match="disk full"):
            write(tmp_path / "t")
    assert contents(tmp_path / "t") == {}
    assert len(write(tmp_path / "t")) == 36


# ---- reading


def test_batch(tmp_path):
    store = write(tmp_path / "t")
    batch = store.batch([3, 0, 35])
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert np.array_equal(batch["discriminative"], store.discriminative[[3, 0, 35]]) and np.array_equal(
        batch["vq"], store.vq[[3, 0, 35]]
    )
    assert batch["labels"].tolist() == store.labels[[3, 0, 35]].tolist()
    assert store.batch(slice(0, 2))["discriminative"].shape == (2, 4)


@pytest.mark.parametrize("batch_size", [1, 7, 36, 50])
def test_batches_are_a_function_of_seed_and_step(tmp_path, batch_size):
    store = write(tmp_path / "t")
    batch = store.batches(batch_size, seed=1)
    assert torch.equal(store.batches(batch_size, seed=1)(11)["vq"], batch(11)["vq"])
    steps = -(-72 // batch_size)
    seen = torch.cat([batch(step)["vq"] for step in range(steps)])[:72]
    for epoch in seen.split(36):  # every row once an epoch
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, store.vq.tolist()))
    assert not torch.equal(seen[:36], seen[36:])
    assert not torch.equal(seen[:36], torch.cat([store.batches(36, seed=2)(0)["vq"]]))


def test_batches_of_some_images(tmp_path):
    store = write(tmp_path / "t")
    batches = store.batches(2, 0, images=[2, 3])
    seen = torch.cat([batches(step)["vq"] for step in range(3)])  # three epochs: each crop of both images once
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, store.vq[6:12].tolist()))
    with pytest.raises(DigitError, match="at least 1"):
        store.batches(4, 0, images=[])
    with pytest.raises(DigitError, match=r"images 3\.\.12 of a store of 12"):
        store.batches(4, 0, images=[3, 12])


def test_an_epoch_is_one_pass_over_the_images_and_crops_take_turns(tmp_path):
    batches = write(tmp_path / "t").batches(12, seed=7)
    epochs = [batches.rows(step) for step in range(6)]
    for rows in epochs:
        assert sorted(rows // 3) == list(range(12))
    crops = [dict(zip((rows // 3).tolist(), (rows % 3).tolist(), strict=True)) for rows in epochs]
    for image in range(12):
        turns = [crop[image] for crop in crops]
        assert sorted(turns[:3]) == sorted(turns[2:5]) == [0, 1, 2] and turns[:3] == turns[3:]
    assert len(set(crops[0].values())) == 3  # images do not all begin with the same crop
    assert not np.array_equal(epochs[0] // 3, epochs[1] // 3)


def test_one_crop_an_image_keeps_the_old_batches(tmp_path):
    """Bit for bit what version 0.2.0's order gave: permutations of the rows by default_rng([seed, epoch])."""
    store = write(tmp_path / "t", crops_per_image=1)
    batches = store.batches(5, seed=3)
    old = np.concatenate([np.random.default_rng([3, epoch]).permutation(12) for epoch in range(4)])
    assert np.array_equal(np.concatenate([batches.rows(step) for step in range(9)]), old[:45])


# ---- shards


def test_shards_hold_what_one_file_holds(tmp_path):
    one, many = write(tmp_path / "one"), write(tmp_path / "many", shard_bytes=320)  # 10 rows of 16 VQ tokens
    names = [f"{name}-{n:05d}-of-00004.npy" for name in ("discriminative", "vq") for n in range(4)]
    assert sorted(contents(tmp_path / "many")) == sorted([*names, "labels.npy", "manifest.json"])
    assert many.manifest["shards"] == [10, 10, 10, 6] and "shards" not in one.manifest
    assert np.array_equal(np.asarray(many.vq), one.vq) and many.vq.shape == one.vq.shape
    rows = [35, 0, 9, 10, 10, 29]
    for name, value in one.batch(rows).items():
        assert torch.equal(many.batch(rows)[name], value)
    assert np.array_equal(many.vq[8:12], one.vq[8:12]) and np.array_equal(many.vq[-1], one.vq[-1])
    for in_memory in (True, False):
        read, wanted = many.batches(7, seed=2, in_memory=in_memory), one.batches(7, seed=2)
        for step in (0, 1, 2, 9, 4):
            assert all(torch.equal(read(step)[name], wanted(step)[name]) for name in ("discriminative", "vq", "labels"))
        read.close()


@pytest.mark.parametrize("broken", [(), (0, 4, 5)], ids=["whole", "broken"])
@pytest.mark.parametrize("stop_at", [2, 5])
def test_interrupted_shards_go_on_and_end_byte_identical(tmp_path, stop_at, broken):
    source = NoiseSource(broken=broken)
    write(tmp_path / "straight", source=source, shard_bytes=320)
    with pytest.raises(Stop):
        write(tmp_path / "stopped", source=source, vq=ToyTokenizer(4, 65536, "vq", stop_at=stop_at), shard_bytes=320)
    with pytest.raises(MismatchError, match="shard_rows = 10, now asked for"):
        write(tmp_path / "stopped", source=source)
    store = write(tmp_path / "stopped", source=source, shard_bytes=320)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    assert np.array_equal(np.asarray(store.vq), write(tmp_path / "one", source=source).vq)
    assert len(write(tmp_path / "stopped", source=source)) == len(store)  # a finished one opens with any shard_bytes


def test_an_image_that_can_be_read_only_once_loses_all_its_crops(tmp_path):
    """Batches of 4 rows cut image 1 (rows 3 to 5) in two; only the first of them can read it."""

    class Flaky(NoiseSource):
        reads = 0

        def read(self, index):
            self.reads += index == 1
            if index == 1 and self.reads > 1:
                raise BadImageError("noise/1.png: gone")
            return super().read(index)

    store = write(tmp_path / "t", source=Flaky())
    assert len(store) == 33 and np.array_equal(store.vq, np.delete(write(tmp_path / "w").vq, [3, 4, 5], axis=0))


def test_large_stores_are_checked_when_asked_and_each_batch_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr("digit.data.tokens.WHOLE_CHECK_BYTES", 100)
    write(tmp_path / "t", shard_bytes=320)
    path = tmp_path / "t" / "discriminative-00002-of-00004.npy"
    data = bytearray(path.read_bytes())
    data[-8:] = np.array([7, 7, 7, 7], "<u2").tobytes()  # tokens of the vocabulary, but not these
    path.write_bytes(data)
    store = TokenStore.open(tmp_path / "t")
    store.batches(36, seed=0)(0)
    with pytest.raises(DigitError, match="discriminative-00002-of-00004.npy has CRC-32"):
        store.verify()
    with pytest.raises(DigitError, match="CRC-32"):
        TokenStore.open(tmp_path / "t", whole=True)
    data[-8:] = np.array([1000] * 4, "<u2").tobytes()
    path.write_bytes(data)
    for in_memory in (True, False):
        batches = TokenStore.open(tmp_path / "t").batches(12, seed=0, in_memory=in_memory)
        with pytest.raises(DigitError, match=r"discriminative holds discriminative \d+..1000"):
            for step in range(3):
                batches(step)
        batches.close()
    os.truncate(path, 200)
    with pytest.raises(DigitError, match="truncated"):
        TokenStore.open(tmp_path / "t")


def test_parts_of_a_batch_are_its_rows(tmp_path):
    store = write(tmp_path / "t")
    for in_memory in (True, False):
        batches = store.batches(8, seed=1, in_memory=in_memory)
        for step in (0, 1, 2, 7):
            parts = [batches.part(step, start, start + 4)["vq"] for start in (0, 4)]
            assert torch.equal(torch.cat(parts), batches(step)["vq"])
        batches.close()


def test_batches_of_some_arrays_are_new_int64_tensors(tmp_path):
    store = write(tmp_path / "t")
    assert store.vq.max() > 32767  # past int16
    read, whole = store.batches(7, 3, names=("vq", "labels")), store.batches(7, 3)
    first = read(2)
    assert set(first) == {"vq", "labels"} and all(value.dtype == torch.int64 for value in first.values())
    first["vq"].zero_()
    assert torch.equal(read(2)["vq"], whole(2)["vq"]) and torch.equal(read(2)["labels"], whole(2)["labels"])
