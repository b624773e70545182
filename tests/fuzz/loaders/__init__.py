"""The loaders, by name."""

from .config import ConfigLoader
from .folder import FolderLoader
from .images import ImagesLoader
from .parquet import ParquetLoader
from .released import ReleasedLoader
from .safetensors import SafetensorsLoader
from .tar import TarLoader
from .tokens import TokensLoader
from .zip import ZipLoader

LOADERS = {
    loader.name: loader
    for loader in (
        ImagesLoader(),
        ParquetLoader(),
        TarLoader(),
        ZipLoader(),
        FolderLoader(),
        ConfigLoader(),
        SafetensorsLoader(),
        TokensLoader(),
        ReleasedLoader(),
    )
}
