"""Errors of a run reach the other ranks as they are."""

import pickle
from pathlib import Path

from digit.runs.claim import OtherSettingsError


def test_an_error_that_rank_0_sends_keeps_its_text_and_parts():
    error = pickle.loads(pickle.dumps(OtherSettingsError("made with other settings", {"vqgan": Path("a/vqgan")})))
    assert str(error) == "made with other settings" and error.kept == {"vqgan": Path("a/vqgan")}
