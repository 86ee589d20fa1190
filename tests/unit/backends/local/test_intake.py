"""A run registers before its trainer exists, and the trainer takes over what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import http_faults
from support.scripted_api import random_batches, scripted_api

from atropos_verl.backends.local.intake import Intake
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposProtocolError, ConfigError

_MAX_TOKEN_LEN = 16


def _config(url: str | None, **settings: object) -> RunConfig:
    values = {"batch_size": 8, "group_size": 4, "data": {"max_token_len": _MAX_TOKEN_LEN}, "max_response_length": 8}
    return RunConfig.from_mapping({**values, "atropos": {"api_url": url}, **settings})


def test_it_registers_once_with_the_step_it_goes_on_from(tmp_path: Path) -> None:
    with (
        scripted_api([], batch_size=8, max_token_len=_MAX_TOKEN_LEN) as api,
        Intake(_config(api.url), tmp_path) as intake,
    ):
        intake.register(3, 8)
        assert intake.is_registered
        intake.register(3, 8)
        sent = api.last("/register").json()
        assert api.count("/register") == 1
        assert (sent["starting_step"], sent["batch_size"]) == (3, 8)
        assert sent["max_token_len"] == _MAX_TOKEN_LEN + 1  # of atroposlib, exclusive
        assert intake.take_polled() == []


def test_a_batch_that_the_first_poll_brings_is_journalled_and_handed_over_once(tmp_path: Path) -> None:
    [body] = random_batches(1, groups=2, group_size=4)
    with (
        scripted_api([], batch_size=8, max_token_len=_MAX_TOKEN_LEN) as api,
        Intake(_config(api.url), tmp_path) as intake,
    ):
        api.script("/batch", http_faults.answer(body))
        intake.register(0, 8)
        [held] = intake.take_polled()
        assert held.body == body
        assert held.entry.path.is_file()
        assert intake.take_polled() == []
    with Intake(
        _config("http://127.0.0.1:9"), tmp_path
    ) as later:  # the API is not asked: an upstream one lends nothing
        [again] = later.resume(0)
        assert again.body == body
        assert later.resume(0) == [again]
    with Intake(_config("http://127.0.0.1:9", resume="disable"), tmp_path) as fresh:
        assert fresh.resume(0) == []


def test_an_api_that_keeps_other_values_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with (
        scripted_api([], batch_size=64, max_token_len=_MAX_TOKEN_LEN) as api,
        Intake(_config(api.url), tmp_path) as intake,
    ):
        with pytest.raises(AtroposProtocolError, match=r"keeps an earlier registration .batch_size 64"):
            intake.register(0, 8)
        assert not intake.is_registered


def test_without_an_api_the_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"atropos\.api_url"):
        Intake(_config(None), tmp_path)
