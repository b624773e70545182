"""--vqgan NAME and hf:REPOSITORY: found, fetched once, or refused with what to download."""

import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import foreign_vq
import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from digit.cli import main
from digit.errors import DigitError
from digit.pipeline.manifest import read_manifest
from digit.pipeline.pipeline import DigitPipeline
from digit.released.convert import ReleasedFiles, convert_release
from digit.released.vq_tokenizers import TOKENIZERS, PublicVQ, find_vq
from digit.tokenizers.vq import VQTokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test leaves this machine, and none reads or fills somebody's cache."""
    for name in (
        "DIGIT_OFFLINE",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))

    def refuse(*_args, **_options):
        raise OSError("no network in this test")

    for name in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _repository, _path: None)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is a folder OWNER/REPOSITORY/PATH, and the names that were downloaded from it."""
    root, downloaded = tmp_path / "hub", []

    def download(repository, path, **_options):
        if not (file := root / repository / path).is_file():
            raise FileNotFoundError(path)
        downloaded.append(f"{repository}/{path}")
        target = tmp_path / "hf" / repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(file, target)

    def info(_self, repository, **_options):
        names = [str(p.relative_to(root / repository)) for p in (root / repository).rglob("*") if p.is_file()]
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda _url, timeout: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    return root, downloaded


def put(form: str, path: Path) -> None:
    """A small file of a format at a path; of diffusers a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "diffusers":
        vqgan = foreign_vq.small(form)
        path.mkdir()
        config = foreign_vq.stand_ins.json.dumps(foreign_vq.stand_ins.diffusers_config(vqgan))
        (path / "config.json").write_text(config)
        state = foreign_vq.stand_ins.foreign_state(form, vqgan)
        return save_file(state, path / "diffusion_pytorch_model.safetensors")
    foreign_vq.write(form, path.parent, foreign_vq.small(form)).rename(path)
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_name_has_a_licence_and_data_and_can_be_downloaded_by_hand(name, monkeypatch):
    public = TOKENIZERS[name]
    assert public.licence and public.data
    assert public.path or public.place.startswith("https://")
    for variable in ("DIGIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(DigitError) as error:
            find_vq(name)
        assert public.place in str(error.value) and "--vqgan FILE" in str(error.value) and "offline" in str(error.value)
        assert "\n" not in str(error.value)
        monkeypatch.delenv(variable)


def test_a_name_is_fetched_converted_and_described(hub, tmp_path, capsys):
    root, downloaded = hub
    put("llamagen", root / TOKENIZERS["llamagen_vq16"].place)
    words = ["convert", "--vqgan", "llamagen_vq16", "--image_size", "16", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "licence MIT; trained on ImageNet-1k" in text and "LlamaGen: 8 x 8 tokens of 16 codes at 16 px" in text
    assert f"digit fit takes {tmp_path / 'out' / 'vqgan'}" in text
    assert downloaded == ["FoundationVision/LlamaGen/vq_ds16_c2i.pt"]
    about = read_manifest(tmp_path / "out")["info"]
    assert about["files"] == {"vqgan": "llamagen_vq16"}
    assert about["vqgan"] == {
        "format": "llamagen", "name": "llamagen_vq16", "licence": "MIT", "data": "ImageNet-1k"
    }  # fmt: skip
    pipe = DigitPipeline.from_pretrained(tmp_path / "out")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert pipe.decode(pipe.vq.encode(images)).shape == images.shape
    origin = "VQ tokenizer: llamagen_vq16; licence MIT; trained on ImageNet-1k"
    assert main(["info", str(tmp_path / "out")]) == 0 and f"licence    {origin}" in capsys.readouterr().out
    assert f"- {origin}" in pipe.write_card(tmp_path / "out").read_text()


def test_a_file_without_a_name_has_no_licence_that_is_known(hub, tmp_path, capsys):
    put("llamagen", tmp_path / "mine.pt")
    out = str(tmp_path / "out")
    assert main(["convert", "--vqgan", str(tmp_path / "mine.pt"), "--image_size", "16", "--out", out]) == 0
    assert main(["info", out]) == 0
    text = capsys.readouterr().out
    assert "VQ tokenizer: a file in the format of LlamaGen; licence not recorded\n" in text and "MIT" not in text


def test_a_folder_of_diffusers_in_a_repository(hub, tmp_path):
    root, downloaded = hub
    put("diffusers", root / "amused/amused-256/vqvae")
    for given in ("amused_256", "hf:amused/amused-256", "hf:amused/amused-256/vqvae"):
        found = find_vq(given)
        assert found.public is TOKENIZERS["amused_256"] and Path(found.path).name == "vqvae"
    assert {name.rpartition("/")[2] for name in downloaded} == {"config.json", "diffusion_pytorch_model.safetensors"}
    convert_release(ReleasedFiles(vqgan="amused_256", image_size=16), tmp_path / "out")
    assert VQTokenizer.load(tmp_path / "out/vqgan").rounding == "nearest"


def test_any_repository(hub, tmp_path):
    root, _ = hub
    put("taming", root / "some/one/last.ckpt")
    assert Path(find_vq("hf:some/one").path).name == "last.ckpt"
    assert find_vq("hf:some/one/last.ckpt").public is None
    put("diffusers", root / "some/folder/vqvae")
    assert Path(find_vq("hf:some/folder").path).name == "vqvae"
    put("taming", root / "some/two/a.ckpt")
    put("taming", root / "some/two/b.ckpt")
    with pytest.raises(DigitError, match=r"holds 2 weights files \(a.ckpt, b.ckpt\): give --vqgan hf:some/two/FILE"):
        find_vq("hf:some/two")
    with pytest.raises(DigitError, match="cannot fetch hf:some/two/c.ckpt .FileNotFoundError.: download hugging"):
        find_vq("hf:some/two/c.ckpt")
    (root / "some/none").mkdir()
    with pytest.raises(DigitError, match=r"holds 0 weights files \(none\)"):
        find_vq("hf:some/none")


def test_a_repository_with_several_known_tokenizers():
    with pytest.raises(DigitError, match="give --vqgan llamagen_vq16 or llamagen_vq8"):
        find_vq("hf:FoundationVision/LlamaGen")


@pytest.mark.parametrize("given", ["hf:", "hf:one", "hf:/", "hf:a b/c"])
def test_impossible_repositories(given):
    with pytest.raises(DigitError, match="give hf:OWNER/REPOSITORY"):
        find_vq(given)


def test_a_list_cannot_be_had_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DigitError, match="offline, so that some/one cannot be listed; give hf:some/one/FILE"):
        find_vq("hf:some/one")


def test_a_misspelt_name_and_a_missing_file(tmp_path, capsys):
    assert main(["convert", "--vqgan", "llamagen_vq17", "--out", str(tmp_path / "out")]) == 2
    assert "no such file or name: llamagen_vq17; the names are llamagen_vq16" in capsys.readouterr().err
    assert main(["convert", "--vqgan", str(tmp_path / "w.ckpt"), "--out", str(tmp_path / "out")]) == 2
    assert f"no such weights file: {tmp_path / 'w.ckpt'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------- a server that is no hub


@contextmanager
def server(content: bytes, length: int | None = None):
    """A server on this machine that answers every request with `content`; yields its address and the paths asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_args):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        running.server_close()


def weights(tmp_path: Path) -> bytes:
    return foreign_vq.write("taming", tmp_path, foreign_vq.small("taming")).read_bytes()


def known(url: str) -> PublicVQ:
    return PublicVQ(place=url, licence="MIT", data="ImageNet-1k")


def test_a_url_is_fetched_once_and_whole(tmp_path, monkeypatch):
    content = weights(tmp_path)
    with server(content) as (address, asked):
        monkeypatch.setitem(TOKENIZERS, "taming_f16_1024", known(f"{address}/f/1/?dl=1"))
        found = find_vq("taming_f16_1024")
        assert Path(found.path).read_bytes() == content and find_vq("taming_f16_1024") == found
    assert asked == ["/f/1/?dl=1"]
    monkeypatch.setenv("DIGIT_OFFLINE", "1")
    assert find_vq("taming_f16_1024") == found, "offline it is taken from the cache"


def test_a_url_goes_through_the_proxy_of_the_environment(tmp_path, monkeypatch):
    with server(weights(tmp_path)) as (address, asked):
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setitem(TOKENIZERS, "taming_f16_1024", known("http://weights.invalid/f/1"))
        assert Path(find_vq("taming_f16_1024").path).is_file()
    assert asked == ["http://weights.invalid/f/1"]


@pytest.mark.parametrize("kind", ["page", "cut"])
def test_what_is_no_weights_file_is_not_kept(tmp_path, monkeypatch, kind):
    content = b"<!doctype html>log in" if kind == "page" else weights(tmp_path)[:1000]
    length = len(content) if kind == "page" else None
    with server(content, length) as (address, _):
        monkeypatch.setitem(TOKENIZERS, "taming_f16_1024", known(f"{address}/f"))
        with pytest.raises(DigitError, match="the server sent .* bytes that are .*: download http"):
            find_vq("taming_f16_1024")
    assert not list((tmp_path / "cache").rglob("*.ckpt"))


def test_a_server_that_is_not_there(monkeypatch):
    with server(b"") as (address, _):
        pass
    monkeypatch.setitem(TOKENIZERS, "taming_f16_1024", known(f"{address}/f"))
    with pytest.raises(DigitError, match="cannot fetch taming_f16_1024 .URLError.: download http"):
        find_vq("taming_f16_1024")
