"""What a stage demands of its parents before it begins."""

import pytest
from fake_chain import STAGES, write_recipe

from pipelines.run import main
from stages.runtime.manifest import write_manifest


@pytest.fixture
def cli(tmp_path):
    def run(*argv):
        return main([*argv, "--pipeline", str(write_recipe(tmp_path)), "--runs", str(tmp_path / "runs")], STAGES)

    return run


def test_a_parents_output_replaced_together_with_its_manifest_is_refused(cli, tmp_path, capsys):  # trap O2
    assert cli("--stage", "gather") == 0
    output = next((tmp_path / "runs" / "toy").glob("gather-*/output"))
    (output / "text.txt").write_text("HELLO")
    write_manifest(output)
    assert cli("--stage", "train") == 2
    assert "manifest.json is not the one that was sealed" in capsys.readouterr().err
    assert list((tmp_path / "runs" / "toy").glob("train-*/output")) == []
