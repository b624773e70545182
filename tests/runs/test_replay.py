"""`digit replay` repeats a failed step from its crash dump and names what was not finite first."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from toy_task import CLASSES, LENGTH, VOCAB, toy_batches, toy_config

from digit.cli import main
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runs.replay import replay
from digit.training.sequence import train_sequence_model


@pytest.mark.parametrize("losses", [{}, {"current_code_weight": 1.0, "next_code_weight": 1.0}], ids=["", "code losses"])
def test_a_failed_step_is_run_again(tmp_path, capsys, losses):
    shape = {"vocab_size": VOCAB, "target_len": LENGTH, "num_classes": CLASSES, "depth": 2, "embed_dim": 16}
    torch.manual_seed(0)
    model = SequenceModel(SequenceConfig(num_heads=2, label_dropout=0.2, **shape))
    weight = model.transformer.blocks[1].mlp.fc1.bias

    def batches(step):
        if step == 5:
            weight.data[3] = math.inf
        return toy_batches()(step)

    cfg, codes = toy_config(num_steps=10, accumulate=2, **losses), torch.randn(1, VOCAB, 4)
    about = json.loads(json.dumps(asdict(model.cfg))) | {"tokens": {}}
    with pytest.raises(DigitError, match="step 6 gave"):
        train_sequence_model(model, batches, cfg, tmp_path, about=about, codes=codes)
    (dump,) = (tmp_path / "crash").iterdir()
    outcome = replay(dump)
    assert outcome.step == 6 and math.isnan(outcome.metrics["loss"])
    assert outcome.bad_weights == ["transformer.blocks.1.mlp.fc1.bias"]
    assert outcome.first_bad.startswith("transformer.blocks.1")
    assert "head.weight" in outcome.bad_gradients and bool(losses) == ("next_cosine" in outcome.metrics)
    assert main(["replay", str(dump)]) == 0
    assert "weights that are not finite before the step: transformer.blocks.1.mlp.fc1.bias\n" in capsys.readouterr().out
    assert main(["replay", str(tmp_path)]) == 2
