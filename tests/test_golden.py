"""The published implementation's numbers, through the tool that users run."""

import json

import check_golden
import pytest
from safetensors.torch import load_file, save_file


def test_fixture_passes(root, capsys):
    assert check_golden.main([str(root / "tests/golden/dense_pmc_ce")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 10 and all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize("file, tensor", [("outputs", "B_final.model.layers.4.mlp.up_proj"), ("inputs", "step_t")])
def test_a_wrong_number_fails(root, tmp_path, capsys, file, tensor):
    source = root / "tests/golden/dense_pmc_ce"
    manifest = json.loads((source / "manifest.json").read_text())
    for name, path in manifest["files"].items():
        manifest["files"][name] = str((source / path).resolve())
    tensors = load_file(manifest["files"][file])
    tensors[tensor] = tensors[tensor] * 1.001
    save_file(tensors, tmp_path / "changed.safetensors")
    manifest["files"][file] = "changed.safetensors"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert check_golden.main([str(tmp_path)]) == 1
    assert "NOT OK" in capsys.readouterr().out


def test_what_is_not_supported_says_so(root, tmp_path, capsys):
    manifest = json.loads((root / "tests/golden/dense_pmc_ce/manifest.json").read_text())
    manifest["memory"]["loss"] = "distill"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert check_golden.main([str(tmp_path), str(tmp_path / "absent")]) == 2
    out = capsys.readouterr().out
    assert "memory.loss = 'distill' is not supported yet" in out and "cannot read the fixture" in out
