"""The checker of annotations that tests/conftest.py installs in the package's rooms."""

from functools import partial
from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int may stand for a float. `Self` goes unchecked: jaxtyping decorates methods one by one, outside their class.
check = partial(beartype, conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any})))
