import sys, time
from pathlib import Path
import pytest


def test_probe(run_toml, tmp_path, capfd):
    import train

    for i in range(3):
        t = time.time()
        code = train.main(["--config", str(run_toml), "--output", str(tmp_path / f"o{i}"), "--quiet"])
        print("code", code, time.time() - t)
    t = time.time()
    code = train.main(
        [
            "--config",
            str(run_toml),
            "--output",
            str(tmp_path / "n"),
            "--quiet",
            "--set",
            "data.cache=" + str(tmp_path / "o0/cache"),
            "--set",
            "validation.prompts=[]",
            "--set",
            "train.steps=2",
        ]
    )
    print("noprompts", code, time.time() - t)
    out, err = capfd.readouterr()
    print(out, err)
    for p in sorted((tmp_path / "o0").rglob("*")):
        print(p.relative_to(tmp_path))
    print((tmp_path / "o0/metrics.jsonl").read_text())
