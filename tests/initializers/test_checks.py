"""What an initializer cannot do in a run is told with all else, before anything is encoded or loaded."""

from pathlib import Path

import pytest

from tests.helpers import BAD_INPUT, run

I2L = ("init.method=i2l", "init.i2l.weights=demo/i2l", "init.i2l.encoders=demo/encoders", "init.i2l.experts=['style']")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("init.i2l.mode=merge", "adapter.use_dora=true"), 'mode = "merge" with [adapter] use_dora'),
        (("init.i2l.strength=auto", "data.held_out=5"), "at least two pictures"),
        (("init.i2l.strength=auto", "init.i2l.pictures=1"), "at least two pictures"),
        (("init.i2l.pictures=['0.png', 'nine.png']",), "pictures: nine.png: not among the training pictures"),
        (("init.i2l.pictures=['0.png', '0.png']",), "must not name a picture twice"),
    ],
)
def test_it_is_told_before_anything_is_encoded(
    settings: tuple[str, ...], said: str, run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("data.held_out=0", *I2L, *settings)
    assert run(run_toml, tmp_path / "out", *given) == BAD_INPUT
    assert said in caplog.text and "[init.i2l]" in caplog.text
    assert not (tmp_path / "out").exists()


def test_auto_under_fsdp_is_told(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(run_toml, tmp_path / "out", *I2L, "init.i2l.strength=auto") == BAD_INPUT
    assert 'strength = "auto" cannot be tried under FSDP' in caplog.text
