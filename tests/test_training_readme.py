"""sfr_kernels/training/README.md lists what the tests show and what the guard says, and is up to date."""

import re

import pytest
import settings

from sfr_kernels.training import guard


def test_every_error_of_the_guard_is_explained():
    texts = [value for name, value in vars(guard).items() if name.isupper() and isinstance(value, str)]
    starts = [re.split("[:;(]", text)[0].strip() for text in texts]
    assert len(starts) >= 10 and not [s for s in starts if f"| {s}" not in settings.README.read_text()]


def test_the_table_of_settings_is_what_the_tests_show():
    for package in ("datasets", "trl", "lightning"):
        pytest.importorskip(package)
    assert settings.main(["--check"]) == 0


def test_a_table_has_each_setting_once_and_the_rest_untested():
    found = settings.Collector()
    found.add("setting", "Trainer", "packing")
    found.add("setting", "own loop", "a frozen head", outcome="refused")
    found.add("setting", "Trainer", "packing")
    found.add("engine", "SFRTrainer", "ZeRO-3", "full")
    assert settings.settings_table("setting", found.settings["setting"]).splitlines()[2:] == [
        "| a frozen head | untested | untested | untested | untested | refused |",
        "| packing | tested | untested | untested | untested | untested |",
    ]
    assert settings.settings_table("engine", found.settings["engine"]).splitlines() == [
        "| engine | adapters | Trainer | SFRTrainer | accelerate | Lightning | own loop |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| ZeRO-3 | full | untested | tested | untested | untested | untested |",
    ]
    for wrong in (("trainer", "packing"), ("Trainer", "packing", "again")):
        with pytest.raises(ValueError):
            found.add("setting", *wrong)
    for outcome in ("refused", "broken"):
        with pytest.raises(ValueError):
            found.add("setting", "Trainer", "packing", outcome=outcome)
    text = settings.architectures({"llama": {}, "gpt2": {}}, {"BartForCausalLM": ()})
    assert text == "Loss and gradients compared: llama, gpt2.\n\nRefused: BartForCausalLM."
    assert settings.with_sections("a <!-- x -->old<!-- /x --> b", {"x": "new"}) == "a <!-- x -->\nnew\n<!-- /x --> b"
    with pytest.raises(ValueError, match="<!-- x -->"):
        settings.with_sections("<!-- x -->", {"x": "new"})
