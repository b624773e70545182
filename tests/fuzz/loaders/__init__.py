"""The loaders, by name."""

from .config import ConfigLoader
from .images import ImagesLoader
from .parquet import ParquetLoader
from .released import ReleasedLoader
from .safetensors import SafetensorsLoader
from .tar import TarLoader
from .tokens import TokensLoader

LOADERS = {
    loader.name: loader
    for loader in (
        ImagesLoader(),
        ParquetLoader(),
        TarLoader(),
        ConfigLoader(),
        SafetensorsLoader(),
        TokensLoader(),
        ReleasedLoader(),
    )
}
